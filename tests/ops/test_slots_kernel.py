"""The slots' kernel on a machine without a GPU: its numbers in Triton's interpreter, and its machine code."""

import inspect
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from ops_triton import machine_code, recorded, resource_usage
from slots_cases import LOCAL, POST, slotted

from trimtab.ops import SlotForm, SlotOpArgs, SteeringBuffers, slot_op_args
from trimtab.ops.kernels import apply_slots as module
from trimtab.ops.kernels import responses as fragments
from trimtab.ops.kernels.launch import REGISTERS
from trimtab.ops.responses import EXPRESSIONS
from trimtab.ops.warmup import warmup_apply_slots_kernel
from trimtab.responses import RESPONSES, Stage
from trimtab.sites import Site

BFLOAT16 = torch.bfloat16


def test_the_interpreted_kernel_equals_the_oracle() -> None:
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "interpreted_slots.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "60 slot cases equal the oracle"


def arguments(
    width: int,
    tokens: int = 4,
    *,
    slots: int = 1,
    gates: int = 1,
    split: bool = True,
    back: bool = False,
    float32: bool = False,
    dtype: torch.dtype = BFLOAT16,
) -> SlotOpArgs:
    names = tuple(name for name in LOCAL if float32 or not RESPONSES[name].reads_float32)
    case = slotted(tokens, width, slots=slots, gates=gates, dtype=dtype, looks_back=back, responses=names)
    steered, rest, hidden = (torch.zeros(tokens, width, dtype=dtype) for _ in range(3))
    return case.args(steered, rest if split else None, hidden)


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
@pytest.mark.parametrize(
    ("width", "slots"), [(100, 3), (4096, 1), (4096, 4), (4096, 8), (4096, 16), (8192, 2), (8192, 4), (16384, 2)]
)
def test_the_kernel_compiles_without_spills(
    width: int, slots: int, dtype: torch.dtype, back: bool, float32: bool
) -> None:
    with recorded(module, "apply_slots_kernel") as kernel:
        module.launch_apply_slots(arguments(width, slots=slots, dtype=dtype, back=back, float32=float32))
    launch = kernel.launches[0]
    usage = resource_usage(kernel.build(launch, 90))
    assert usage["REG"] * launch["num_warps"] * 32 <= REGISTERS  # or it cannot start
    assert usage["STACK"] == usage["LOCAL"] == 0


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_rows_are_loaded_sixteen_bytes_at_a_time_and_the_stream_once(slots: int) -> None:
    with recorded(module, "apply_slots_kernel") as kernel:
        module.launch_apply_slots(arguments(4096, slots=slots))
    launch = kernel.launches[0]
    code = machine_code(kernel.build(launch, 90))
    row = 4096 // (launch["num_warps"] * 32) // 8  # loads of 16 bytes per thread, to cover one of bfloat16
    loads = [line for line in code if "LDG" in line and ".128" in line]
    assert len(loads) == row * (2 + 2 * slots)  # both parts of the stream; what each slot reads, what it writes
    assert len([line for line in code if "STG" in line]) == row + 1  # the last of them: what each slot did


def test_a_variant_for_each_kind_of_stream_serves_every_row_record_and_number_of_tokens() -> None:
    """So warm-up, which launches both at every site, leaves nothing to compile in service."""
    sites = [Site(layer, POST) for layer in range(3)]
    for slots, rows in ((1, 5), (4, 6)):
        buffers = SteeringBuffers(
            sites, hidden_size=128, max_rows=rows, max_tokens=64, dtype=BFLOAT16, gates=2,
            slots=SlotForm(slots, ("clip",), writes=False),
        )  # fmt: skip
        modules = [nn.Module() for _ in sites]
        for owner, site in zip(modules, sites, strict=True):
            buffers.attach(owner, site)
        with recorded(module, "apply_slots_kernel") as kernel:
            for tokens, owner in product((1, 2, 3, 15, 16, 17, 64), modules):
                steered, rest = (torch.zeros(tokens, 128, dtype=BFLOAT16) for _ in range(2))
                for other in (None, rest, steered):  # the last as warm-up does
                    module.launch_apply_slots(slot_op_args(owner, POST, steered, other))
        assert len(kernel.keys) == 2
        assert warmup_apply_slots_kernel(modules, [1, 16]) == 0  # on a CPU there is nothing to compile


def test_where_records_lie_selects_no_variant() -> None:
    args = arguments(128)
    apart = {name: getattr(args, name).clone() for name in SlotOpArgs._fields[4:]}
    off = {name: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for name, t in apart.items()}
    with recorded(module, "apply_slots_kernel") as kernel:
        for parts in ({}, apart, off):
            module.launch_apply_slots(args._replace(**parts))
    assert len(kernel.keys) == 1


def test_the_kernel_names_every_tensor_of_its_tuple() -> None:
    pointers = [name.removeprefix("p_") for name in module.apply_slots_kernel.arg_names if name.startswith("p_")]
    assert pointers == list(SlotOpArgs._fields)


def test_every_response_has_an_expression_and_a_fragment_of_its_own_code() -> None:
    """The interpreted kernel compares what they compute; here none is forgotten."""
    for name, response in RESPONSES.items():
        assert getattr(fragments, f"{name.upper()}_CODE").value == response.code
        if response.stage is not Stage.LOCAL:
            continue
        assert getattr(fragments, name).arg_names == list(inspect.signature(EXPRESSIONS[name]).parameters)
