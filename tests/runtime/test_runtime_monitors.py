"""Monitors in the runtime: what it writes for a site's and a row's probe, seen through the operator on the CPU."""

import numpy as np
import pytest
import torch
from runtime_model import HIDDEN, SITES, resolved, vector
from torch import nn

from trimtab.errors import SteeringError
from trimtab.ops import Emission, SteeringBuffers, emit, set_emission
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime import SteeringRuntime
from trimtab.sites import HookPoint, Site

FIRST, MIDDLE, LAST = SITES
STEER, OTHER = vector(1), vector(2)
TOKENS = 4
BATCH = (["a", "-"], [2, 5], [2, 2], [3, 5])  # a: one prefill and one decode token; an unsteered one: two decode tokens


def gate(site: Site, seed: int = 100, **options) -> ResolvedGate:
    numbers = {"threshold": 0.3, "sharpness": 1.5} | options
    return ResolvedGate.of(vector(seed, (site,)), **numbers)


def make(*, row_monitor: bool = False, cross_layer: bool = False, max_requests: int = 3):
    buffers = SteeringBuffers(
        SITES, hidden_size=HIDDEN, max_rows=1 + 2 * max_requests, max_tokens=8, dtype=torch.float32,
        row_monitor=row_monitor,
    )  # fmt: skip
    modules = []
    for site in SITES:
        module = nn.Module()
        buffers.attach(module, site)
        set_emission(module, Emission(cross_layer=cross_layer and site == MIDDLE))
        modules.append(module)
    return buffers, SteeringRuntime(buffers, max_requests=max_requests), modules


def stream(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((TOKENS, HIDDEN)).astype(np.float32))


def added(modules: list[nn.Module], x: torch.Tensor) -> np.ndarray:
    """What each site adds to the same input: [S, N, H]."""
    sums = [emit(module, site.hook, x) - x for module, site in zip(modules, SITES, strict=True)]
    return torch.stack(sums).numpy()


def factor(one: ResolvedGate, x: torch.Tensor) -> np.ndarray:
    score = x.double().numpy() @ one.probe.block[0].astype(np.float64)
    y = 1.0 / (1.0 + np.exp(-one.sharpness * (score - one.threshold)))
    return 1.0 - y if one.invert else y


def due(factors: dict[Site, np.ndarray], steering=STEER) -> np.ndarray:
    """Token 0 is prefill and has full strength, token 1 is decode; the others are not steered."""
    out = np.zeros((len(SITES), TOKENS, HIDDEN))
    for place, site in enumerate(SITES):
        out[place, 0] = steering.directions[site]
        out[place, 1] = steering.directions[site] * np.float64(factors[site][1] if site in factors else 1.0)
    return out


def assert_added(modules, expected, seed: int = 0) -> None:
    np.testing.assert_allclose(added(modules, stream(seed)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"invert": True}])
def test_a_sites_monitor_gates_decode_tokens_there_and_is_cleared_again(options) -> None:
    _, runtime, modules = make()
    one = gate(MIDDLE, **options)
    runtime.admit("a", resolved([(STEER, 1.0)], [(STEER, 1.0)]))
    runtime.step(*BATCH)
    assert_added(modules, due({}))
    runtime.set_monitor(one)
    assert_added(modules, due({}))  # nothing is written outside of a step
    runtime.step(*BATCH)
    assert dict(runtime.monitors) == {MIDDLE: one}
    assert_added(modules, due({MIDDLE: factor(one, stream())}))
    runtime.clear_monitor(MIDDLE)
    runtime.clear_monitor(FIRST)
    runtime.step(*BATCH)
    assert_added(modules, due({}))
    assert not runtime.monitors


def test_across_layers_a_monitor_gates_its_site_and_later_ones_and_anew_in_each_step() -> None:
    buffers, runtime, modules = make(cross_layer=True)
    one = gate(MIDDLE)
    runtime.set_monitor(one)
    runtime.admit("a", resolved([(STEER, 1.0)], [(STEER, 1.0)]))
    for seed in range(3):  # the same plan three times: what the last pass multiplied must not be there any more
        runtime.step(*BATCH)
        y = factor(one, stream(seed))
        assert_added(modules, due({MIDDLE: y, LAST: y}), seed)
    runtime.clear_monitor(MIDDLE)
    runtime.step(*BATCH)  # the last pass multiplied, though nothing is on any more
    assert_added(modules, due({}))
    buffers.row_gate.fill_(7.0)
    runtime.step(*BATCH)
    assert buffers.row_gate[0] == 7.0, "without a monitor an equal plan is not written again"


def test_padding_of_any_content_leaves_no_trace_in_the_factors() -> None:
    buffers, runtime, modules = make(cross_layer=True)
    runtime.set_monitor(gate(MIDDLE))
    runtime.admit("a", resolved([], [(STEER, 1.0)]))
    runtime.step(["a"], [5], [1], [3])
    padded = torch.full((8, HIDDEN), torch.nan)
    padded[0] = 0.5
    for module, site in zip(modules, SITES, strict=True):
        emit(module, site.hook, padded)
    assert buffers.row_gate[1:].tolist() == [1.0] * 7
    assert buffers.token_scales.tolist() == [0.0] * 8
    assert buffers.row_gate[0] < 1.0
    runtime.release("a")
    runtime.step(["-"], [5], [1], [3])  # all idle again, and written so
    assert buffers.row_gate.tolist() == [1.0] * 8


def test_an_engine_in_which_nobody_is_steered_writes_nothing_for_its_monitor() -> None:
    buffers, runtime, _ = make(cross_layer=True)
    runtime.set_monitor(gate(MIDDLE))
    runtime.step(*BATCH)
    assert not buffers.monitor_active.any()


def test_a_rows_own_probes_gate_that_row_alone_each_at_its_site() -> None:
    buffers, runtime, modules = make(row_monitor=True)
    ones = [gate(LAST, 101), gate(FIRST, 102, invert=True)]
    steering = resolved([(STEER, 1.0)], [(STEER, 1.0)])
    runtime.admit("a", steering, probes=ones)
    runtime.admit("-", steering)  # the same content without probes
    runtime.step(*BATCH)
    expected = due({one.site: factor(one, stream()) for one in ones})
    expected[:, 2:] = STEER.block[:, None]
    assert_added(modules, expected)
    assert buffers.row_monitor_active[:, 0].tolist() == [True, False, True]
    assert runtime.rows_in_use == 2  # prefill of "a" and all of the other share a row

    runtime.admit("a", steering)
    runtime.step(*BATCH)
    assert_added(modules, np.broadcast_to(STEER.block[:, None], (3, TOKENS, HIDDEN)))


def test_a_row_that_gets_other_content_loses_its_probes() -> None:
    buffers, runtime, modules = make(row_monitor=True, max_requests=1)
    runtime.admit("a", resolved([], [(STEER, 1.0)]), probes=[gate(FIRST)])
    runtime.step(*BATCH)
    for seed in (2, 3):  # both rows are given to new content
        runtime.admit("a", resolved([], [(vector(seed), 1.0)]))
        runtime.step(*BATCH)
    expected = due({}, vector(3))
    expected[:, 0] = 0.0
    assert_added(modules, expected)
    assert not buffers.row_probes.any()
    assert not buffers.row_monitor_active.any()


def test_ranks_that_saw_the_same_probes_agree() -> None:
    digests = []
    for probe in (100, 100, 101):
        _, runtime, _ = make(row_monitor=True)
        runtime.admit("a", resolved([], [(STEER, 1.0)]), probes=[gate(FIRST, probe)])
        runtime.step(*BATCH)
        digests.append(runtime.digest())
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_be_a_monitor_is_refused_and_the_request_keeps_what_it_held() -> None:
    _, runtime, _ = make(row_monitor=True)
    elsewhere = gate(Site(7, HookPoint.POST_BLOCK))
    with pytest.raises(SteeringError, match="hard: a monitor opens gradually"):
        runtime.set_monitor(gate(FIRST, sharpness=None))
    with pytest.raises(SteeringError, match=r"probe: is read at post_block:7; these buffers have post_block:0"):
        runtime.set_monitor(elsewhere)
    with pytest.raises(SteeringError, match="probe: has width 3; the model's is 8"):
        runtime.set_monitor(ResolvedGate.of(vector(1, (FIRST,), hidden=3), 0.0, 1.0))
    runtime.admit("a", resolved([], [(STEER, 1.0)]))
    for probes, words in (
        ([elsewhere], "is read at post_block:7"),
        ([gate(FIRST, 100), gate(FIRST, 101)], "two are read at post_block:0"),
    ):
        with pytest.raises(SteeringError, match=words):
            runtime.admit("a", resolved([], [(OTHER, 1.0)]), probes=probes)
    assert runtime.rows_in_use == 1
    _, without, _ = make()
    with pytest.raises(SteeringError, match="probes: these buffers hold none: make them with row_monitor=True"):
        without.admit("a", resolved([], [(STEER, 1.0)]), probes=[gate(FIRST)])
