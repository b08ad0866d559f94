"""The kernel of `route` on a machine without a GPU: its machine code, and what selects a variant of it.

Its numbers are in tests/runtime/test_route.py.
"""

from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ops_triton import recorded, resource_usage

from trimtab.ops import SteeringBuffers, route
from trimtab.ops.args import RouteOpArgs
from trimtab.ops.kernels import route as module
from trimtab.ops.route import route_args
from trimtab.ops.span_buffers import SpanBuffers
from trimtab.ops.warmup import late_variants
from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Term
from trimtab.program.spans import Spans
from trimtab.runtime import SteeringRuntime
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors.vector import SteeringVector

KINDS = (torch.int32, torch.int64)


def arguments(
    tokens: int = 4, requests: int = 2, gates: int = 4, kinds: tuple[torch.dtype, torch.dtype] = KINDS
) -> RouteOpArgs:
    buffers = SpanBuffers(requests, max_tokens=tokens, gates=gates)
    words = torch.zeros(tokens, 8, dtype=torch.int64)
    positions, ids = (torch.zeros(tokens, dtype=kind) for kind in kinds)
    return route_args(buffers, words, torch.zeros(tokens, buffers.gates.shape[2], dtype=torch.int64), positions, ids)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("gates", [0, 4])
def test_the_kernel_compiles_without_spills(gates: int, architecture: int) -> None:
    for kinds in (KINDS, KINDS[::-1]) if architecture == 90 else [KINDS]:
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


def test_what_a_warm_engine_launches_is_compiled_already(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(0, HookPoint.POST_BLOCK)
    vector = SteeringVector({site: np.ones(8, np.float32)})
    steering = ResolvedSteering(
        (EMPTY, PhaseProgram.of([Term(vector, 1.0)])),
        spans=Spans(2, (0, 2), (0, 1), ((0,), (1,)), (Phase.PREFILL, Phase.DECODE)),
    )
    monkeypatch.setattr(route, "_launches_kernel", lambda args: True)
    late = late_variants()
    for gates in (0, 4):
        buffers = SteeringBuffers([site], hidden_size=8, max_rows=5, max_tokens=64, dtype=torch.float32, gates=gates,
                                  max_probes=5, span_requests=2)  # fmt: skip
        runtime = SteeringRuntime(buffers, max_requests=2)
        with recorded(module, "route_kernel") as kernel:
            monkeypatch.setattr(kernel, "__name__", f"route_kernel {gates}")
            assert runtime.warm_up() == len(kernel.keys) == 2  # with ids, and where nobody asks for them
            runtime.admit("a", steering)
            for first, count in ((0, 1), (1, 17), (18, 16), (34, 1)):
                positions = torch.zeros(64, dtype=torch.int64)[first : first + count]
                for ids in (None, torch.zeros(64, dtype=torch.int32)[first:]):
                    runtime.step(["a"], [first], [count], [2], positions=positions, token_ids=ids)
            assert len(kernel.launches) == 2 + 8
            assert len(kernel.keys) == 2
    assert late_variants() == late


def test_the_kernel_names_every_tensor_of_its_tuple() -> None:
    pointers = [name.removeprefix("p_") for name in module.route_kernel.arg_names if name.startswith("p_")]
    views = ["token_floats", "gate_floats", "row_gates"]  # of three of them, as other numbers
    assert pointers == [*RouteOpArgs._fields, *views]
