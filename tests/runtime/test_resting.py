"""Sites that rest: in eager execution they cost no launch, and a token that is to be steered never meets one."""

from typing import Any

import numpy as np
import pytest
import torch
from runtime_model import HIDDEN, SITES, make_buffers, resolved, vector
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.ops import ROWS_ONLY, Emission, SteeringBuffers, emit, set_emission
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime import SteeringRuntime, probes_needed, rows_needed
from trimtab.sites import HookPoint, Site

ALL, FIRST, LAST = vector(1), vector(2, SITES[:1]), vector(3, SITES[2:])
EAGER = Emission(terms=ROWS_ONLY, eager=True)


def resting(buffers: SteeringBuffers) -> list[bool]:
    return [state.resting for state in buffers.states]


def step(runtime: SteeringRuntime, *names: str) -> None:
    """One decode token for each request; their prompts have 10 tokens."""
    runtime.step(list(names), np.full(len(names), 12), np.ones(len(names), int), np.full(len(names), 10))


def test_only_the_sites_of_the_batch_are_awake() -> None:
    buffers = make_buffers()
    runtime = SteeringRuntime(buffers, max_requests=4)
    assert resting(buffers) == [False, False, False]  # nobody has planned yet: warm-up and canaries act everywhere
    step(runtime)
    assert resting(buffers) == [True, True, True]
    runtime.admit("first", resolved([], [(FIRST, 1.0)]))
    runtime.admit("last", resolved([(LAST, 1.0)], [(LAST, 1.0)]))
    for batch, awake in ((["first"], [0]), (["last"], [2]), (["first", "last"], [0, 2]), (["other"], []), ([], [])):
        step(runtime, *batch)
        assert [place for place, rests in enumerate(resting(buffers)) if not rests] == awake
    runtime.release("first")
    runtime.admit("first", resolved([(ALL, 1.0)], [(ALL, 1.0)]))
    step(runtime, "first")
    assert resting(buffers) == [False, False, False]
    runtime.release("first")
    step(runtime, "first")
    assert resting(buffers) == [True, True, True]


def test_sites_that_decide_for_later_ones_are_awake() -> None:
    buffers = SteeringBuffers(
        SITES, hidden_size=HIDDEN, max_rows=rows_needed(2, 1), max_tokens=16, dtype=torch.float32, gates=1,
        max_probes=probes_needed(2, 1),
    )  # fmt: skip
    runtime = SteeringRuntime(buffers, max_requests=2)
    gate = ResolvedGate.of(vector(4, SITES[:1]), 0.0, 1.0)
    behind = PhaseProgram.of([Term(LAST, 1.0, gate=gate)])
    runtime.admit("gated", ResolvedSteering((behind, behind)))
    runtime.admit("plain", resolved([(LAST, 1.0)], [(LAST, 1.0)]))
    step(runtime, "gated")
    assert resting(buffers) == [False, False, False]
    step(runtime, "plain")
    assert resting(buffers) == [True, True, False]
    runtime.set_monitor(gate)
    step(runtime, "plain")
    assert resting(buffers) == [False, True, False]


class Operators(TorchDispatchMode):
    """Notes the operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "trimtab":
            self.seen.append(func._schema.name.removeprefix("trimtab::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def module() -> nn.Module:
    """A module with one row, which the first of its two tokens uses."""
    buffers = make_buffers(sites=(Site(0, HookPoint.POST_BLOCK),))
    buffers.table[0, 1] = 1.0
    buffers.any_active[:] = True
    buffers.index[0] = 1
    module = nn.Module()
    buffers.attach(module, buffers.sites[0])
    module.states = buffers.states
    set_emission(module, EAGER)
    return module


def steered(module: nn.Module, **how: Any) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    hidden = torch.zeros(2, HIDDEN)
    with Operators() as operators:
        out = emit(module, HookPoint.POST_BLOCK, hidden, **how)
    return hidden, out, operators.seen


def test_a_resting_site_runs_nothing_and_returns_what_it_was_given(module: nn.Module) -> None:
    module.states[0].resting = True
    hidden, out, ran = steered(module)
    assert out is hidden
    assert ran == []


def test_an_awake_site_writes_in_place_where_it_may(module: nn.Module) -> None:
    hidden, out, ran = steered(module, in_place=True)
    assert out.data_ptr() == hidden.data_ptr()
    assert ran == ["apply_steering_"]
    assert out[0].eq(1).all()
    hidden, out, ran = steered(module)
    assert ran == ["apply_steering"]
    assert hidden.eq(0).all()


def test_a_site_does_not_rest_where_passes_may_be_compiled_or_captured(module: nn.Module) -> None:
    module.states[0].resting = True
    set_emission(module, EAGER._replace(eager=False))
    assert steered(module)[1][0].eq(1).all()


@pytest.mark.parametrize("traced", [False, True])
def test_a_compiled_graph_holds_the_steering_of_a_site_that_rested_when_it_was_traced(
    module: nn.Module, traced: bool
) -> None:
    set_emission(module, EAGER._replace(traced=traced))
    module.states[0].resting = True
    compiled = torch.compile(lambda x: emit(module, HookPoint.POST_BLOCK, x, in_place=True), backend="aot_eager")
    hidden = torch.zeros(2, HIDDEN)
    assert compiled(hidden)[0].eq(1).all()
    assert hidden.eq(0).all()  # a graph keeps what it was given
