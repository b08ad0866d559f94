"""The gates' kernel on a machine without a GPU: its numbers in Triton's interpreter, and its machine code."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gates_cases import gated_stack
from ops_triton import recorded, resource_usage

from trimtab.ops import GateOpArgs
from trimtab.ops.kernels import apply_gates as module
from trimtab.ops.warmup import warmup_apply_gates_kernel


def test_the_interpreted_kernel_equals_the_oracle() -> None:
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "interpreted_gates.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "24 gate cases equal the oracle"


def arguments(width: int, tokens: int = 4, *, gates: int = 4, split: bool = True, add: bool = True) -> GateOpArgs:
    stack = gated_stack(tokens, width, gates=gates, dtype=torch.bfloat16)
    hidden, rest, steered = (torch.zeros(tokens, width, dtype=torch.bfloat16) for _ in range(3))
    return stack.args(0, steered if add else steered[:0], hidden, rest if split else None)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("width", [100, 4096, 8192])
def test_the_kernel_compiles_without_spills(width: int, add: bool) -> None:
    with recorded(module, "apply_gates_kernel") as kernel:
        module.launch_apply_gates(arguments(width, add=add))
    usage = resource_usage(kernel.build(kernel.launches[0], 90))
    assert usage["REG"] <= 64
    assert usage["STACK"] == usage["LOCAL"] == 0


def test_numbers_of_tokens_and_places_in_buffers_select_no_variant() -> None:
    with recorded(module, "apply_gates_kernel") as kernel:
        for tokens in (1, 2, 15, 16, 17, 64):
            module.launch_apply_gates(arguments(128, tokens))
    assert len(kernel.keys) == 1


def test_a_variant_for_adding_and_one_for_deciding_of_each_kind_of_stream_serve_every_site_and_size() -> None:
    """So warm-up, which launches all four at every site, leaves nothing to compile in service."""
    stack = gated_stack(64, 128, gates=4, dtype=torch.bfloat16)
    with recorded(module, "apply_gates_kernel") as kernel:
        for tokens in (1, 2, 3, 15, 16, 17, 64):
            hidden, rest, steered = (torch.zeros(tokens, 128, dtype=torch.bfloat16) for _ in range(3))
            for place, target in product(range(3), (steered, steered.new_empty(0, 128))):
                module.launch_apply_gates(stack.args(place, target, hidden))
                module.launch_apply_gates(stack.args(place, target, hidden, rest))
                module.launch_apply_gates(stack.args(place, target, hidden, hidden))  # as warm-up does
    assert len(kernel.keys) == 4
    assert warmup_apply_gates_kernel(stack.modules, [1, 16]) == 0  # on a CPU there is nothing to compile


def test_the_kernel_names_every_tensor_of_its_tuple() -> None:
    pointers = [name.removeprefix("p_") for name in module.apply_gates_kernel.arg_names if name.startswith("p_")]
    assert pointers == list(GateOpArgs._fields)
