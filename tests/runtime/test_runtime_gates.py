"""Gates in the runtime: each token has the gates that its request asked for its position; what they did adds up."""

import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from runtime_model import HIDDEN, SITES, received, vector

from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.joint_gate import Join, joined
from trimtab.program.lowering import contents_of
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime import SteeringRuntime, probes_needed, rows_needed
from trimtab.sites import HookPoint, Site

MAX_REQUESTS, MAX_TOKENS, GATES = 3, 40, 2

VECTORS = [vector(seed, sites) for seed, sites in enumerate([SITES, SITES[1:], SITES[2:]])]
PROBES = [vector(100 + seed, (site,)) for seed, site in enumerate([SITES[0], SITES[0], SITES[2]])]
OPTIONS = [
    ResolvedGate.of(PROBES[0], 0.5, 2.0),
    ResolvedGate.of(PROBES[0], -1.0, None, invert=True),
    ResolvedGate.of(PROBES[1], 0.25, 1.0),
    ResolvedGate.of(PROBES[2], 0.0, 8.0),
]

JOINT = [joined(Join.ALL, [OPTIONS[2], OPTIONS[0]]), joined(Join.ANY, [OPTIONS[3], OPTIONS[1]])]

plain = st.lists(st.tuples(st.sampled_from(VECTORS), st.sampled_from([0.5, -2.0, 3.0])), max_size=2)


def behind(gates, most):
    one = st.tuples(st.sampled_from(VECTORS), st.sampled_from([0.5, 1.0, -2.0]), st.sampled_from(gates))
    return st.lists(one, max_size=most, unique_by=lambda item: item[2].digest)


gated = st.one_of(behind(OPTIONS[:3], GATES), behind(JOINT, 1))  # a joint gate takes both lanes


def make(max_requests=MAX_REQUESTS, *, gates=GATES, sites=SITES):
    buffers = SteeringBuffers(
        sites,
        hidden_size=HIDDEN,
        max_rows=rows_needed(max_requests, gates),
        max_tokens=MAX_TOKENS,
        dtype=torch.float32,
        gates=gates,
        max_probes=probes_needed(max_requests, gates),
    )
    return buffers, SteeringRuntime(buffers, max_requests=max_requests)


def program(plain, gated):
    terms = [Term(one, scale) for one, scale in plain]
    return PhaseProgram.of([*terms, *(Term(one, scale, gate=gate) for one, scale, gate in gated)])


def gates_of(buffers, token):
    """What the device holds for a token: {(probe, numbers of the gate, how it is joined to which): what it lets through
    [S, H]}."""
    state, found, key = buffers.gates, {}, None
    for slot in range(state.count):
        row, probe, site = (int(t[token, slot]) for t in (state.rows, state.probes, state.sites))
        if site == 0:
            assert (row, probe) == (0, 0)
            assert not state.params[token, slot].any()
            continue
        coefficient, *numbers = state.params[token, slot].tolist()
        key = (state.probe_table[probe].numpy().tobytes(), site, *numbers, key if numbers[-1] else None)
        found[key] = buffers.table[:, row].double().numpy() * coefficient
    return found


def due_gates(asked):
    """The same from what was asked."""
    due = {}
    for one, scale, gate in asked:
        row = np.zeros((len(SITES), HIDDEN))
        for place, site in enumerate(SITES):
            if site in one.directions:
                row[place] = np.float64(scale) * one.directions[site].astype(np.float64)
        key = None
        for place, member in enumerate(gate.members, 1):
            join = 0.0 if key is None else {Join.ALL: 1.0, Join.ANY: -1.0}[gate.join]
            numbers = (member.threshold, member.sharpness, float(member.invert), join)
            key = (member.probe.block[0].tobytes(), SITES.index(member.site) + 1, *numbers, key)
            due[key] = row if place == len(gate.members) else 0.0 * row
    return due


@dataclass
class Request:
    name: str
    phases: list  # per phase (plain, gated)
    prompt: int
    computed: int = 0
    running: bool = False
    factors: dict = field(default_factory=dict)  # (within, gate digest) -> list of factors that the device reported

    @property
    def steering(self):
        return ResolvedSteering(tuple([program(*asked) for asked in self.phases]))


class Engine(RuleBasedStateMachine):
    """Requests come, run in chunks across their prompt's end, are preempted, finish; the device invents factors."""

    @initialize()
    def start(self):
        self.buffers, self.runtime = make()
        self.twin_buffers, self.twin = make()
        self.requests, self.born = [], 0
        self.rng = np.random.default_rng(0)
        self.total = 0

    def call(self, method, *args, **kwargs):
        for runtime in (self.runtime, self.twin):
            getattr(runtime, method)(*args, **kwargs)

    @rule(
        phases=st.lists(st.tuples(plain, gated), min_size=2, max_size=2), prompt=st.integers(1, 8), same=st.booleans()
    )
    def arrive(self, phases, prompt, same):
        self.born += 1
        self.requests.append(Request(f"r{self.born}", [phases[0]] * 2 if same else phases, prompt))

    @rule(data=st.data())
    def run(self, data):
        waiting = [r for r in self.requests if not r.running]
        if waiting and sum(r.running for r in self.requests) < MAX_REQUESTS:
            request = data.draw(st.sampled_from(waiting))
            request.running, request.computed = True, 0
            self.call("admit", request.name, request.steering)

    @rule(data=st.data(), preempt=st.booleans())
    def leave(self, data, preempt):
        running = [r for r in self.requests if r.running]
        if running:
            request = data.draw(st.sampled_from(running))
            request.running = False
            self.call("release", request.name)
            if not preempt:
                self.requests.remove(request)
                self.check_report(request)

    @rule(data=st.data())
    def step(self, data):
        batch = [(r, data.draw(st.integers(0, 6))) for r in self.requests if r.running]
        batch = [(r, count) for r, count in data.draw(st.permutations(batch)) if count]
        names, firsts = [r.name for r, _ in batch], [r.computed for r, _ in batch]
        counts, prompts = [count for _, count in batch], [r.prompt for r, _ in batch]
        self.call("step", ["", *names], [0, *firsts], [2, *counts], [9, *prompts])
        place = 2
        assert not gates_of(self.buffers, 0)
        values, owns = self.rng.random((2, *self.buffers.gates.values.shape)).astype(np.float32)
        for buffers in (self.buffers, self.twin_buffers):
            buffers.gates.values.copy_(torch.from_numpy(values))
            buffers.gates.owns.copy_(torch.from_numpy(owns))
        for request, count in batch:
            for position in range(request.computed, request.computed + count):
                asked = request.phases[int(position >= request.prompt)]
                got, want = gates_of(self.buffers, place), due_gates(asked[1])
                assert got.keys() == want.keys()
                for key, row in want.items():
                    np.testing.assert_allclose(got[key], row, rtol=1e-6, atol=1e-6)
                lane = 0
                for gate in (item.gate for item in program(*asked).gated):
                    told = [(("", gate.digest), values[lane + len(gate.members) - 1, place])]
                    for member in gate.members if len(gate.members) > 1 else ():
                        alone = values if member is gate.members[0] else owns
                        told.append(((gate.digest.hex(), member.digest), alone[lane, place]))
                        lane += 1
                    lane += len(gate.members) == 1
                    for key, factor in told:
                        request.factors.setdefault(key, []).append(float(factor))
                        self.total += 1
                place += 1
            request.computed += count
        assert not any(gates_of(self.buffers, token) for token in range(place, MAX_TOKENS))
        sums = received(self.buffers)[2:place]
        due = [
            sum(
                (scale * v.directions[site].astype(float) for v, scale in asked if site in v.directions),
                np.zeros(HIDDEN),
            )
            for request, count in batch
            for position in range(request.computed - count, request.computed)
            for asked in [request.phases[int(position >= request.prompt)][0]]
            for site in SITES
        ]
        if due:
            np.testing.assert_allclose(sums.reshape(-1, HIDDEN), due, rtol=1e-5, atol=1e-5)

    @rule(data=st.data())
    def look(self, data):
        if self.requests:
            self.check_report(data.draw(st.sampled_from(self.requests)))

    def check_report(self, request):
        report = self.runtime.gate_report(request.name)
        uses = {(use.within, bytes.fromhex(use.gate)): use for use in report}
        assert len(uses) == len(report)
        for key, factors in request.factors.items():
            use = uses[key]
            assert (use.tokens, use.above_half) == (len(factors), sum(f > 0.5 for f in factors))
            assert use.mean == pytest.approx(np.mean(factors), abs=1e-6)
        assert all(use.tokens == 0 for key, use in uses.items() if key not in request.factors)
        assert sum(use.tokens for use in self.runtime.gate_totals()) == self.total

    @invariant()
    def twins_agree(self):
        if hasattr(self, "runtime"):
            assert self.runtime.digest() == self.twin.digest()
            assert torch.equal(self.buffers.gates.slab, self.twin_buffers.gates.slab)
            assert not self.buffers.gates.probe_table[0].any()
            assert self.runtime.rows_in_use <= rows_needed(MAX_REQUESTS, GATES)

    def teardown(self):
        if hasattr(self, "runtime"):
            for request in self.requests:
                self.call("release", request.name)
            self.call("step", [], [], [], [])
            assert self.runtime.rows_in_use == 0
            assert not self.buffers.gates.slab.any()


TestGates = Engine.TestCase
TestGates.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def one_gate(scale=1.0, gate=OPTIONS[0], plain=()):
    both = program(plain, [(VECTORS[0], scale, gate)])
    return ResolvedSteering((both, both))


def test_gated_and_ungated_content_share_rows_and_thresholds_share_probes():
    buffers, runtime = make()
    runtime.admit("a", one_gate(plain=[(VECTORS[0], 3.0)]))
    runtime.admit("b", one_gate(scale=-2.0, gate=OPTIONS[1]))
    runtime.step(["a", "b"], [0, 0], [1, 1], [1, 1])
    assert (runtime.rows_in_use, runtime.row_uploads) == (1, 1)
    assert buffers.gates.probes[:2, 0].tolist() == [1, 1]


def test_an_unchanged_batch_is_not_copied_again():
    buffers, runtime = make()
    runtime.admit("a", one_gate())
    runtime.step(["a"], [5], [1], [3])
    buffers.gates.slab.fill_(0x5A)
    runtime.step(["a"], [6], [1], [3])
    assert bool((buffers.gates.slab == 0x5A).all())


def test_a_full_house_of_distinct_gates_fits():
    buffers, runtime = make()
    for number in range(MAX_REQUESTS):
        phases = []
        for phase in range(2):
            seed = 1000 + 100 * number + 10 * phase
            asked = [
                (vector(seed + k), 1.0, ResolvedGate.of(vector(seed + k, SITES[:1]), 0.0, 1.0)) for k in range(GATES)
            ]
            phases.append(program([(vector(seed + 9), 2.0)], asked))
        runtime.admit(f"r{number}", ResolvedSteering(tuple(phases)))
    runtime.step([f"r{n}" for n in range(MAX_REQUESTS)], [0] * 3, [2] * 3, [1] * 3)
    assert runtime.rows_in_use == rows_needed(MAX_REQUESTS, GATES) - 1
    assert len({gate for token in range(6) for gate in gates_of(buffers, token)}) == 2 * GATES * MAX_REQUESTS


def test_a_request_whose_probes_find_no_room_is_refused_and_holds_nothing():
    buffers = SteeringBuffers(
        SITES, hidden_size=HIDDEN, max_rows=19, max_tokens=8, dtype=torch.float32, gates=1, max_probes=2
    )
    runtime = SteeringRuntime(buffers, max_requests=3)
    runtime.admit("a", one_gate())
    other = ResolvedGate.of(vector(77, SITES[:1]), 0.0, 1.0)
    behind = program([], [(VECTORS[0], 1.0, other)])
    with pytest.raises(SteeringError, match="max_probes: request 'b' finds no room"):
        runtime.admit("b", ResolvedSteering((behind, behind)))
    runtime.admit("c", one_gate())
    runtime.release("a")
    runtime.release("c")
    assert runtime.rows_in_use == 0
    runtime.admit("b", ResolvedSteering((behind, behind)))


@settings(max_examples=60)
@given(st.tuples(plain, gated, plain, gated))
def test_a_request_holds_exactly_the_contents_that_are_reserved_for_it(asked):
    steering = ResolvedSteering((program(*asked[:2]), program(*asked[2:])))
    _, runtime = make()
    runtime.admit("a", steering)
    contents = contents_of(steering, lowers=False)
    assert (runtime.rows_in_use, runtime._gates.probes_in_use) == (len(contents.rows), len(contents.probes))


def test_a_joint_gate_is_reported_whole_and_by_its_members_beside_equal_gates_of_their_own():
    """What it is made of counts for its probe's label in totals, and the whole for all gates of its sort."""
    named = [
        ResolvedGate.of(one.probe, one.threshold, 1.0, label=name)
        for one, name in zip((OPTIONS[0], OPTIONS[2], OPTIONS[3]), ("angry", "sad", "late"), strict=True)
    ]
    buffers, runtime = make(gates=4)
    both = program([], [(VECTORS[2], 1.0, joined(Join.ALL, named)), (VECTORS[0], 1.0, named[0])])
    runtime.admit("a", ResolvedSteering((both, both)))
    runtime.step(["a"], [0], [2], [2])
    lanes = [member.label for item in both.gated for member in item.gate.members]
    first = [item.gate.label for item in both.gated].index("(all)")
    buffers.gates.values.zero_()
    buffers.gates.owns.zero_()
    buffers.gates.values[:, :2] = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    buffers.gates.owns[:, :2] = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    start = 0 if first == 0 else 1
    report, joint = runtime.gate_report("a"), both.gated[first].gate.digest.hex()
    whole, *members = [use for use in report if joint in (use.gate, use.within)]
    assert (whole.probe, whole.within, whole.tokens, whole.mean) == ("(all)", "", 2, start + 3.0)
    assert {use.within for use in members} == {whole.gate}
    due = {lanes[start]: start + 1.0, lanes[start + 1]: 10.0 * (start + 2), lanes[start + 2]: 10.0 * (start + 3)}
    assert {use.probe: use.mean for use in members} == due
    (alone,) = [use for use in report if use not in (whole, *members)]
    assert (alone.probe, alone.mean, alone.gate) == ("angry", 4.0 if start == 0 else 1.0, named[0].digest.hex())
    assert {use.probe: use.tokens for use in runtime.gate_totals()} == {"(all)": 2, "angry": 4, "sad": 2, "late": 2}


def test_more_gates_than_the_buffers_hold_are_refused_and_the_old_steering_kept():
    buffers, runtime = make(gates=1)
    runtime.admit("a", one_gate())
    both = program([], [(VECTORS[0], 1.0, OPTIONS[0]), (VECTORS[0], 1.0, OPTIONS[1])])
    with pytest.raises(SteeringError, match="gates: request 'a' brings 2 in a phase; the buffers hold 1"):
        runtime.admit("a", ResolvedSteering((both, both)))
    runtime.step(["a"], [0], [1], [1])
    assert len(gates_of(buffers, 0)) == 1
    plain = SteeringRuntime(
        SteeringBuffers(SITES, hidden_size=HIDDEN, max_rows=9, max_tokens=8, dtype=torch.float32), max_requests=1
    )
    with pytest.raises(SteeringError, match="the buffers hold 0"):
        plain.admit("a", one_gate())


def test_pipeline_stages_agree_and_count_each_gate_once():
    (_, first), (_, last) = make(sites=SITES[:1]), make(sites=SITES[1:])
    late = one_gate(gate=OPTIONS[3])  # its probe is on the last stage
    for runtime in (first, last):
        runtime.admit("a", late)
        runtime.step(["a"], [0], [3], [2])
    assert first.digest() == last.digest()
    assert first.gate_report("a") == ()
    assert [use.tokens for use in last.gate_report("a")] == [3]


def test_reports_of_gone_requests_are_kept_but_not_for_ever(monkeypatch):
    monkeypatch.setattr("trimtab.runtime.token_meters.KEPT_REPORTS", 2)
    _, runtime = make()
    for name in ("a", "b", "c"):
        runtime.admit(name, one_gate())
        runtime.step([name], [0], [1], [1])
        runtime.release(name)
    assert [len(runtime.gate_report(name)) for name in ("c", "b", "a")] == [1, 1, 0]
    assert sum(use.tokens for use in runtime.gate_totals()) == 3


def test_reports_may_be_asked_for_outside_the_inference_mode_of_steps():
    _, runtime = make()
    runtime.admit("a", one_gate())
    for _ in range(2):
        with torch.inference_mode():
            runtime.step(["a"], [0], [2], [1])
        assert runtime.gate_report("a")
    with torch.inference_mode():
        runtime.step([], [], [], [])
    assert [use.tokens for use in runtime.gate_report("a")] == [4]


def test_a_probe_of_another_width_is_refused():
    _, runtime = make()
    wide = vector(1, (Site(0, HookPoint.POST_BLOCK),), hidden=HIDDEN + 1)
    with pytest.raises(SteeringError, match="brings width 9"):
        runtime.admit("a", one_gate(gate=ResolvedGate.of(wide, 0.0, 1.0)))


def serve(runtime, name, steering, owner=None):
    """A request of one token, from its admission to its end."""
    runtime.admit(name, steering, owner=owner)
    runtime.step([name], [0], [1], [1])
    runtime.release(name)


def test_owners_are_matched_whole_and_their_requests_reported_together():
    _, runtime = make()
    for name in ("a", "a-b", "0_a", "a-0"):
        serve(runtime, name, one_gate())
    assert [use.tokens for use in runtime.gate_report("a")] == [1]
    assert runtime.gate_report(".*") == runtime.gate_report("") == ()
    for _ in range(5):
        serve(runtime, "b", one_gate(), owner="all of b")
    runtime.admit("c", one_gate(), owner="all of b")
    runtime.step(["c"], [0], [2], [1])
    assert [use.tokens for use in runtime.gate_report("all of b")] == [7]
    assert runtime.gate_report("b") == ()


def test_totals_are_kept_by_label_in_bounded_number_and_lose_nothing(monkeypatch):
    monkeypatch.setattr("trimtab.runtime.meters.MOST_LABELS", 3)
    _, runtime = make()
    site = SITES[:1]
    for number in range(8):  # inline probes, each another one
        serve(runtime, "a", one_gate(gate=ResolvedGate.of(vector(300 + number, site), 0.0, 1.0)))
    for number in range(5):  # registered one after the other
        for threshold in (0.0, 1.0):
            gate = ResolvedGate.of(vector(400 + number, site), threshold, 1.0, label=f"name{number}")
            serve(runtime, "a", one_gate(gate=gate))
    uses = {use.probe: use.tokens for use in runtime.gate_totals()}
    assert uses == {"(inline)": 8, "name0": 2, "name1": 2, "(others)": 6}


def test_what_is_kept_of_requests_that_are_gone_does_not_grow_with_the_width_of_their_probes():
    _, runtime = make()
    for number in range(400):
        gate = ResolvedGate.of(vector(500 + number, SITES[:1]), 0.0, 1.0)
        serve(runtime, f"r{number}", one_gate(gate=gate))
    runtime.gate_totals()  # reads what has not been read yet
    kept = runtime._gates.meters
    held = {type(part) for report in kept._finished.values() for named in report for part in named}
    assert (held, len(kept._finished)) == ({str}, 400)
    assert len(kept._totals) == 1
    assert not kept._owner
    assert len(pickle.dumps((kept._finished, kept._totals))) < 400 * 1024


def test_a_pass_that_was_not_planned_does_not_change_what_the_last_one_counted():
    buffers, runtime = make()
    runtime.admit("a", one_gate())
    runtime.step(["a"], [0], [4], [2])
    buffers.gates.values[:, :4] = 0.75
    runtime.before_unplanned_pass()
    buffers.gates.values.fill_(0.0)  # a pass over no requests, with the gates of the last one
    (use,) = runtime.gate_report("a")
    assert (use.tokens, use.mean, use.above_half) == (4, 0.75, 4)
    runtime.before_unplanned_pass()
    assert runtime.gate_report("a") == (use,)
