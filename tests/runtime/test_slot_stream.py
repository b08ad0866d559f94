"""Random lives of requests with slots, in tables that hold little: every token's slots do what its request asked."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from runtime_model import HIDDEN, SITES, vector
from slots_model import TILTED, VECTORS, Ask, done, due, make_slot_buffers, steering

from trimtab.errors import SteeringError
from trimtab.program.lowering import contents_of
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime import SteeringRuntime

MAX_REQUESTS, GATES = 3, 2
GATED = [ResolvedGate.of(vector(70 + seed, SITES[:1]), 0.25 * seed, 1.0) for seed in range(1, 3)]
FACTORS = {gate.digest: 1.0 / (1.0 + gate.threshold) for gate in GATED}

sites = st.sampled_from([SITES, SITES[:1], SITES[1:]])
gates = st.sampled_from([None, None, *GATED])
bounds = st.sampled_from([(0.0, 0.0), (-1.0, 2.0), (0.5, 0.5), (-np.inf, 0.25), (1.0, np.inf)])
members = st.builds(
    lambda along, strength, ends, where, gate: Ask(along, strength, *ends, sites=where, gate=gate),
    st.sampled_from([*VECTORS[:3], *TILTED]), st.sampled_from([1.0, 0.5, 2.0]), bounds, sites, gates,
)  # fmt: skip
swaps = st.builds(lambda where, gate: Ask(VECTORS[3], to=VECTORS[0], sites=where, gate=gate), sites, gates)
sets = st.lists(members, max_size=2, unique_by=lambda ask: ask.along.digest)
asked = st.builds(lambda held, swapped: held + swapped, sets, st.lists(swaps, max_size=1))
terms = st.lists(st.tuples(st.sampled_from(VECTORS), st.sampled_from([1.0, -2.0])), max_size=1)


class Lives(RuleBasedStateMachine):
    """Two ranks that see the same, and two stages of a pipeline."""

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16]), max_rows=st.integers(5, 16))
    def start(self, dtype, max_rows):
        self.dtype = dtype
        self.buffers = [
            make_slot_buffers(max_rows, dtype=dtype, sites=here, gates=GATES, max_probes=9)
            for here in (SITES, SITES, SITES[:1], SITES[1:])
        ]
        self.runtimes = [SteeringRuntime(buffers, max_requests=MAX_REQUESTS) for buffers in self.buffers]
        self.running: dict[str, tuple] = {}
        self.born = 0

    def contents(self, but=""):
        return {
            key
            for name, (_, _, one) in self.running.items()
            if name != but
            for key in contents_of(one, lowers=False).rows
        }

    @rule(prefill=asked, decode=asked, added=terms, again=st.booleans(), data=st.data())
    def admit(self, prefill, decode, added, again, data):
        name = data.draw(st.sampled_from(sorted(self.running))) if again and self.running else f"r{self.born}"
        if name not in self.running and len(self.running) == MAX_REQUESTS:
            return
        self.born += 1
        one = steering(prefill, decode, added)
        needed = self.contents(but=name) | contents_of(one, lowers=False).rows
        if len(needed) <= self.runtimes[0].capacity:
            for runtime in self.runtimes:
                runtime.admit(name, one)
            self.running[name] = prefill, decode, one
            return
        for runtime in self.runtimes:
            before = runtime.digest()
            with pytest.raises(SteeringError, match="finds no room"):
                runtime.admit(name, one)
            assert runtime.digest() == before

    @rule(data=st.data())
    def leave(self, data):
        if self.running:
            name = data.draw(st.sampled_from(sorted(self.running)))
            del self.running[name]
            for runtime in self.runtimes:
                runtime.release(name)

    @rule(data=st.data())
    def step(self, data):
        names = data.draw(st.permutations(sorted(self.running)))[: data.draw(st.integers(0, MAX_REQUESTS))]
        names = [*names, "stranger"]
        for runtime in self.runtimes:
            runtime.step(names, np.full(len(names), 4), np.full(len(names), 2), np.full(len(names), 5))
        stream = np.random.default_rng(self.born).standard_normal((len(SITES), HIDDEN)) * 3.0
        for position, name in enumerate(names):
            for phase in range(2):
                want = self.running[name][phase] if name in self.running else []
                for buffers in self.buffers:
                    self.check(buffers, stream, 2 * position + phase, want)

    def check(self, buffers, stream, token, want):
        thresholds = buffers.gates.params[token, :, 1].tolist()
        tolerance = 2e-5 if self.dtype == torch.float32 else 0.15
        for y, site in zip(stream, SITES, strict=True):
            if site in buffers.sites:
                got = done(buffers, y, token, site, [1.0 / (1.0 + each) for each in thresholds])
                np.testing.assert_allclose(got, due(y, want, site, FACTORS), atol=tolerance, rtol=tolerance)
                busy = [ask for ask in want if site in ask.sites]
                assert not (busy and buffers.states[buffers.sites.index(site)].resting)

    @invariant()
    def ranks_agree_and_hold_no_more_than_is_asked(self):
        if hasattr(self, "runtimes"):
            assert len({runtime.digest() for runtime in self.runtimes}) == 1
            assert self.runtimes[0].rows_in_use == len(self.contents())
            assert torch.equal(self.buffers[0].slots.slab, self.buffers[1].slots.slab)
            assert not self.buffers[0].slots.slab[:, 0].any()


TestSlotStream = Lives.TestCase
TestSlotStream.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
