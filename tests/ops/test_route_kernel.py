"""The kernel of `route` on a machine without a GPU: its machine code, and what selects a variant of it.

Its numbers are in tests/runtime/test_route.py.
"""

from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ops_triton import recorded, resource_usage

from trimtab.ops.args import RouteOpArgs
from trimtab.ops.kernels import route as module
from trimtab.ops.route import route_args
from trimtab.ops.span_buffers import SpanBuffers

KINDS = (torch.int32, torch.int64)


def arguments(
    tokens: int = 4, requests: int = 2, gates: int = 4, kinds: tuple[torch.dtype, torch.dtype] = KINDS
) -> RouteOpArgs:
    buffers = SpanBuffers(requests, max_tokens=tokens, gates=gates)
    words = torch.zeros(tokens, 8, dtype=torch.int64)
    positions, ids = (torch.zeros(tokens, dtype=kind) for kind in kinds)
    return route_args(buffers, words, torch.zeros(tokens, buffers.gates.shape[2], dtype=torch.int64), positions, ids)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("gates", [0, 1, 4])
def test_the_kernel_compiles_without_spills(gates: int, architecture: int) -> None:
    for kinds in product(KINDS, KINDS) if architecture == 90 else [KINDS]:
        with recorded(module, "route_kernel") as kernel:
            module.launch_route(arguments(gates=gates, kinds=kinds), 4)
        usage = resource_usage(kernel.build(kernel.launches[0], architecture))
        assert usage["REG"] <= module.REGISTERS
        assert usage["STACK"] == usage["LOCAL"] == 0


def test_numbers_of_tokens_and_requests_select_no_variant() -> None:
    with recorded(module, "route_kernel") as kernel:
        for tokens, requests in product((1, 2, 15, 16, 17, 64), (1, 3, 256)):
            args = arguments(tokens, requests)
            for count in (1, tokens):
                module.launch_route(args, count)
            odd = args._replace(positions=torch.zeros(tokens + 1, dtype=torch.int32)[1:])
            module.launch_route(odd, tokens)
    assert len(kernel.keys) == 1


def test_the_kernel_names_every_tensor_of_its_tuple() -> None:
    pointers = [name.removeprefix("p_") for name in module.route_kernel.arg_names if name.startswith("p_")]
    views = ["token_floats", "gate_floats", "row_gates"]  # of three of them, as other numbers
    assert pointers == [*RouteOpArgs._fields, *views]
