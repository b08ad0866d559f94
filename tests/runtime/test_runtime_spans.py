"""Requests with spans in the runtime: what the device holds behind each step, and what is counted of it."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from runtime_model import SITES, received, vector
from span_programs import Asking, Said, random_request, span_buffers
from spans_model import Engine, Part
from spans_model import due as program_due

from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.lowering import contents_of
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.spans import IdSet, Spans
from trimtab.runtime import SteeringRuntime, span_tables
from trimtab.runtime import runtime as module
from trimtab.sites import Phase


class Served:
    """A runtime that an engine drives; behind each step the device is held to what is due."""

    def __init__(self, seed: int, sites: Any = SITES) -> None:
        self.rng = np.random.default_rng(seed)
        self.buffers = span_buffers(sites)
        self.runtime = SteeringRuntime(self.buffers, max_requests=4)
        self.engine = Engine(self.rng, self.new, self.join, self.leave)
        self.made = 0
        self.gates: dict[Any, Any] = defaultdict(lambda: np.zeros(3))  # by owner and gate: tokens, sum, above half
        self.slots: dict[Any, Any] = defaultdict(lambda: np.zeros(3))
        self.seen: dict[str, int] = defaultdict(int)

    def new(self) -> Asking:
        self.made += 1
        return random_request(self.rng, self.made)

    def join(self, life: Asking, upto: int) -> None:
        self.runtime.admit(life.name, life.steering, owner=life.owner, tokens=life.text, upto=upto)

    def leave(self, life: Asking) -> None:
        self.runtime.release(life.name)

    def step(self, parts: list[Part]) -> list[tuple[Asking, int, Said, int]]:
        """Of each token its request, position, what is done to it, and by which program."""
        tokens, positions, ids = [], [], []
        for part in parts:
            life, text = part.life, part.text()
            assert isinstance(life, Asking)
            for position in range(part.first, len(text)):
                place = int(position >= life.prompt)
                if life.spans is not None:
                    place = program_due(life.spans, text, position)
                tokens.append((life, position, life.due(text, position, place), place))
                positions.append(position)
                ids.append(text[position])
        tail = [int(each) for each in self.rng.integers(-1, 99, 5)]
        kind = (torch.int32, torch.int64)[self.made % 2]
        self.runtime.step(
            [part.life.name for part in parts],
            [part.known for part in parts],
            [len(part.tokens) for part in parts],
            [part.life.prompt for part in parts],
            positions=torch.tensor(positions + tail, dtype=kind),
            token_ids=torch.tensor(ids + tail, dtype=kind),
        )
        return tokens

    def check(self, tokens: list[tuple[Asking, int, Said, int]]) -> None:
        buffers, y = self.buffers, self.rng.standard_normal(8)
        sums = received(buffers)
        for place, (life, position, said, _) in enumerate(tokens):
            said.check(buffers, sums, place, y)
            self.seen["spans" if life.spans else "phases" if life.says else "nothing"] += 1
            if said.program.row_key:
                assert buffers.decode_mask[place] == (position >= life.prompt)
                for state, site in zip(buffers.states, SITES, strict=True):
                    assert not (state.resting and site in said.program.sites)
        count = len(tokens)
        assert not buffers.index[count:].any()
        assert (buffers.row_gate[count:] == 1.0).all()
        assert not buffers.token_slab[count:].view(torch.int64)[:, 1].any()
        assert buffers.gates is not None
        assert not buffers.gates.slab[count:].any()

    def compute(self, tokens: list[tuple[Asking, int, Said, int]]) -> None:
        """What a forward pass leaves behind, and what must be counted of it."""
        gates, slots, rng = self.buffers.gates, self.buffers.slots, self.rng
        assert gates is not None
        assert slots is not None
        values = rng.random(gates.values.shape).astype(np.float32)
        found = rng.standard_normal(slots.corrections.shape).astype(np.float32)
        gates.values.copy_(torch.from_numpy(values))
        slots.corrections.copy_(torch.from_numpy(found))
        for token, (life, position, said, _) in enumerate(tokens):
            for lane, item in enumerate(said.program.gated):
                factor = float(values[lane, token])
                self.gates[life.owner, item.gate.digest.hex()] += np.array([1, factor, factor > 0.5])
            phase = ("prefill", "decode")[position >= life.prompt]
            for place, site in enumerate(slots.sites):
                for k, slot in enumerate(slot for slot in said.program.slots if site in slot.at):
                    c = float(found[place, k, token])
                    self.slots[life.owner, phase, slot.digest.hex()] += np.array([1, abs(c), c != 0])

    def check_reports(self) -> None:
        for owner in {owner for owner, _ in self.gates}:
            told = {use.gate: (use.tokens, use.mean * use.tokens, use.above_half) for use in
                    self.runtime.gate_report(owner) if use.tokens}  # fmt: skip
            want = {gate: numbers for (whose, gate), numbers in self.gates.items() if whose == owner}
            assert told.keys() == want.keys()
            for gate, numbers in want.items():
                np.testing.assert_allclose(told[gate], numbers, rtol=1e-5)
        for owner in {owner for owner, *_ in self.slots}:
            uses = {(use.phase, use.slot): (use.measured, use.total, use.moved) for use in
                    self.runtime.slot_report(owner) if use.measured}  # fmt: skip
            want = {key: numbers for (whose, *key), numbers in self.slots.items() if whose == owner
                    for key in [tuple(key)]}  # fmt: skip
            assert uses.keys() == want.keys()
            for key, numbers in want.items():
                np.testing.assert_allclose(uses[key], numbers, rtol=1e-5)


def disturb(served: Served, monitor: ResolvedGate) -> None:
    """What else happens between steps."""
    luck = served.rng.random()
    if luck < 0.1:
        served.runtime.before_unplanned_pass()  # a pass over nobody overwrites what gates and slots left
        served.buffers.gates.values.fill_(float("nan"))
    elif luck < 0.15:
        served.runtime.set_monitor(monitor)
    elif luck < 0.25:
        served.runtime.clear_monitor(monitor.site)
    elif luck < 0.3:
        tokens = served.step([])
        served.check(tokens)
        served.compute(tokens)


@pytest.mark.parametrize("seed", range(4))
def test_behind_each_step_every_token_has_what_is_due_to_it_and_it_is_counted(seed: int) -> None:
    served = Served(seed)
    monitor = ResolvedGate.of(vector(99, SITES[:1]), 0.0, 1.0)
    for number, parts in enumerate(served.engine.passes(200)):
        disturb(served, monitor)
        tokens = served.step(parts)
        served.check(tokens)
        served.compute(tokens)
        if served.runtime.monitors:  # in cross-layer mode it multiplies the factors of decode tokens
            served.buffers.row_gate.mul_(torch.where(served.buffers.decode_mask > 0, 0.5, 1.0))
        if number % 40 == 39:
            served.check_reports()
    served.check_reports()
    assert min(served.seen.values()) > 40
    assert len(served.gates) > 8
    assert len(served.slots) > 8


PLAIN = ResolvedSteering((PhaseProgram.of([Term(vector(1), 1.0)]), PhaseProgram.of([Term(vector(1), 2.0)])))
CASES = (PhaseProgram.of([]), PhaseProgram.of([Term(vector(2), 1.0)]), PhaseProgram.of([Term(vector(3), 1.0)]))
SPANS = Spans(4, (0, 4, 8), (0, 1, 2), ((0,), (1,), (2,)), (Phase.PREFILL, Phase.DECODE, Phase.DECODE))
RUNS = ResolvedSteering(CASES, spans=SPANS)
BY_IDS = ResolvedSteering(CASES, spans=Spans(4, (0, 4), (0, 1), ((0,), (1, 2)), SPANS.phases, (IdSet(((3, 5),)),)))


@pytest.fixture
def buffers() -> SteeringBuffers:
    return span_buffers()


@pytest.fixture
def runtime(buffers: SteeringBuffers) -> SteeringRuntime:
    return SteeringRuntime(buffers, max_requests=4)


def step(runtime: SteeringRuntime, names: list[str], first: int, count: int = 1, ids: list[int] | None = None) -> None:
    """Every request brings `count` tokens from position `first` on; prompts have 4."""
    size = len(names)
    positions = torch.arange(first, first + count).repeat(size)
    known = None if ids is None else torch.tensor(ids).repeat(size)
    runtime.step(names, [first] * size, [count] * size, [4] * size, positions=positions, token_ids=known)


def rows(buffers: SteeringBuffers, count: int) -> list[int]:
    return buffers.index[:count].tolist()


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each launch of `route`."""
    launched: list[int] = []

    def recorded(args: Any, count: int) -> None:
        launched.append(count)
        original(args, count)

    original = module.route
    monkeypatch.setattr(module, "route", recorded)
    return launched


def test_a_pass_without_a_request_with_spans_launches_nothing(runtime: SteeringRuntime, routed: list[int]) -> None:
    runtime.admit("plain", PLAIN)
    step(runtime, ["plain", "stranger"], 2)
    runtime.admit("a", RUNS)
    for _ in range(3):
        step(runtime, ["plain", "stranger"], 6)
        step(runtime, ["stranger"], 6)
    assert routed == []
    step(runtime, ["a", "plain"], 3, 2)
    step(runtime, ["a", "plain"], 5, 2)
    assert routed == [4, 4]
    runtime.release("a")
    step(runtime, ["plain"], 5)
    assert routed == [4, 4]


def test_a_steady_step_is_decided_anew_and_nothing_is_uploaded(
    runtime: SteeringRuntime, buffers: SteeringBuffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.admit("a", RUNS)
    step(runtime, ["a", "b"], 6)
    before = rows(buffers, 1)
    copies: list[Any] = []
    monkeypatch.setattr(module.TokenUploader, "write", lambda *args, **kwargs: copies.append("tokens"))
    monkeypatch.setattr(span_tables.RowUploader, "write", lambda *args: copies.append("lines"))
    step(runtime, ["a", "b"], 7)
    assert rows(buffers, 2) == [*before, 0]
    step(runtime, ["a", "b"], 8)
    assert rows(buffers, 1) not in ([0], before)
    assert copies == []


@pytest.mark.parametrize("then", [PLAIN, BY_IDS, None])
def test_whoever_takes_the_place_of_a_request_with_spans_has_its_own_records(
    runtime: SteeringRuntime, buffers: SteeringBuffers, then: ResolvedSteering | None
) -> None:
    """Of as many tokens, at the same place, in the same slot of the planner."""
    runtime.admit("a", RUNS)
    step(runtime, ["a"], 4, 2, [3, 0])
    first = received(buffers)[:2]
    np.testing.assert_allclose(first, np.stack([CASES[1].terms[0].vector.block] * 2), rtol=1e-6)
    runtime.release("a")
    runtime.admit("b", then)
    step(runtime, ["b"], 4, 2, [3, 0])
    wanted = {PLAIN: [vector(1).block * 2.0] * 2, BY_IDS: [vector(3).block, vector(2).block]}
    np.testing.assert_allclose(received(buffers)[:2], wanted.get(then, [np.zeros((3, 8))] * 2), rtol=1e-6)
    if then is not BY_IDS:
        assert not buffers.token_slab.view(torch.int64)[:, 1].any()


def test_a_line_goes_up_once_and_a_past_where_there_is_one(
    runtime: SteeringRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, list[int]]] = []
    tables = runtime._spans
    assert tables is not None
    for name in ("_lines", "_rings"):
        uploader = getattr(tables, name)
        monkeypatch.setattr(uploader, "write", lambda some, name=name: written.append((name, sorted(some))))
    runtime.admit("a", BY_IDS)
    runtime.admit("b", RUNS, tokens=[1] * 9, upto=9)
    for position in (4, 5):
        step(runtime, ["a", "b"], position, ids=[3])
    assert written == [("_lines", [1, 2])]
    runtime.release("a")
    runtime.admit("a", BY_IDS, tokens=[1] * 9, upto=6)
    step(runtime, ["a", "b"], 6, ids=[3])
    assert written[1:] == [("_lines", [1]), ("_rings", [1])]
    runtime.seed("a", [1] * 9, 9)
    runtime.seed("b", [1] * 9, 9)
    runtime.seed("nobody", [1] * 9, 9)
    step(runtime, ["a", "b"], 9, ids=[3])
    assert written[3:] == [("_rings", [1])]


def test_what_is_missing_to_decide_is_refused_before_anything_is_steered_by_it(runtime: SteeringRuntime) -> None:
    with pytest.raises(SteeringError, match=r"tokens: request 'a' begins at position 6, .* 5 are given"):
        runtime.admit("a", BY_IDS, tokens=[1] * 5, upto=6)
    with pytest.raises(SteeringError, match="0 are given"):
        runtime.admit("a", BY_IDS, upto=6)
    runtime.admit("runs", RUNS, upto=6)
    runtime.admit("a", BY_IDS)
    with pytest.raises(ValueError, match="no positions were given"):
        runtime.step(["runs"], [0], [2], [4])
    with pytest.raises(ValueError, match="no ids were given"):
        step(runtime, ["a", "runs"], 4)
    step(runtime, ["runs"], 4)
    with pytest.raises(ValueError, match="2 tokens, but 1 positions and 0 ids"):
        runtime.step(["runs"], [0], [2], [4], positions=torch.zeros(1, dtype=torch.int64))


def test_buffers_without_spans_or_with_too_few_refuse_them() -> None:
    none = SteeringRuntime(span_buffers(requests=0), max_requests=4)
    none.admit("plain", PLAIN)
    with pytest.raises(SteeringError, match="spans: request 'a' brings some; the buffers hold none"):
        none.admit("a", RUNS)
    assert "a" not in none._planner.slots
    with pytest.raises(SteeringError, match="max_requests: 4 given; the buffers have room for spans of 3"):
        SteeringRuntime(span_buffers(requests=3), max_requests=4)


@pytest.mark.parametrize("seed", range(20))
def test_a_request_with_spans_holds_exactly_the_contents_that_are_reserved_for_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    life = random_request(rng, 0)
    while life.spans is None:
        life = random_request(rng, 0)
    buffers = span_buffers()
    runtime = SteeringRuntime(buffers, max_requests=4)
    runtime.admit("a", life.steering)
    held = contents_of(life.steering, lowers=False)
    assert runtime.rows_in_use == len(held.rows)
    assert runtime._gates is not None
    assert runtime._gates.probes_in_use == len(held.probes)
    runtime.release("a")
    assert runtime.rows_in_use == runtime._gates.probes_in_use == 0


def test_stages_of_a_pipeline_agree_whatever_their_sites() -> None:
    stages = [Served(3, sites) for sites in (SITES, SITES[:1], SITES[1:])]
    for parts in zip(*(stage.engine.passes(60) for stage in stages), strict=True):
        for stage, own in zip(stages, parts, strict=True):
            stage.step(own)
        assert len({stage.runtime.digest() for stage in stages}) == 1


def test_a_probe_of_a_row_stands_before_every_program_of_decode_tokens() -> None:
    buffers = SteeringBuffers(SITES, hidden_size=8, max_rows=20, max_tokens=16, dtype=torch.float32,
                              row_monitor=True, span_requests=2)  # fmt: skip
    runtime = SteeringRuntime(buffers, max_requests=2)
    probe = ResolvedGate.of(vector(99, SITES[:1]), 0.25, 1.0)
    for name, probes in (("a", [probe]), ("b", [])):
        runtime.admit(name, RUNS, probes=probes)
        step(runtime, [name], 4, 8)
        assert len(set(rows(buffers, 8))) == 2
        thresholds = buffers.row_params[0, buffers.index[:8], 0]
        assert bool((thresholds == 0.25).all()) == bool(probes)


def test_sites_rest_at_which_no_program_of_the_batch_acts() -> None:
    """Which of its programs a token receives is not known to the host, so a site that any needs is awake."""
    buffers = SteeringBuffers(SITES, hidden_size=8, max_rows=20, max_tokens=16, dtype=torch.float32, span_requests=2)
    runtime = SteeringRuntime(buffers, max_requests=2)
    cases = (CASES[0], *(PhaseProgram.of([Term(vector(each, (SITES[each],)), 1.0)]) for each in (0, 2)))
    runtime.admit("a", ResolvedSteering(cases, spans=SPANS))
    runtime.admit("plain", PLAIN)
    for batch, resting in ((["a"], [False, True, False]), (["plain"], [False] * 3), (["b"], [True] * 3)):
        for position in (4, 5, 9):
            step(runtime, batch, position)
            assert [state.resting for state in buffers.states] == resting
    runtime.release("a")
    step(runtime, ["a"], 4)
    assert all(state.resting for state in buffers.states)


def test_gates_of_programs_are_probes_of_their_rows_where_an_engine_lowers_them() -> None:
    """And a program whose gate stays in a lane, or that has none, has no probe, whoever had its row before."""
    soft = ResolvedGate.of(vector(98, SITES[:1]), 0.25, 2.0)
    hard = ResolvedGate.of(vector(97, SITES[:1]), 0.5, None)
    here = vector(5, SITES[:1])
    cases = (CASES[0], *(PhaseProgram.of([Term(here, 2.0, gate=gate)]) for gate in (soft, hard)))
    buffers = SteeringBuffers(SITES, hidden_size=8, max_rows=20, max_tokens=16, dtype=torch.float32, gates=2,
                              max_probes=9, row_monitor=True, span_requests=2)  # fmt: skip
    runtime = SteeringRuntime(buffers, max_requests=2, lowers=True)
    runtime.admit("a", ResolvedSteering(cases, spans=SPANS), owner="a")
    step(runtime, ["a"], 3, 8)  # a token of the prompt, four by the first program, three by the second
    thresholds = buffers.row_params[0, buffers.index[:8], 0].tolist()
    assert thresholds[1:5] == [0.25] * 4
    assert 0.25 not in thresholds[:1] + thresholds[5:]
    np.testing.assert_allclose(received(buffers)[1:5, 0], [2.0 * here.block[0]] * 4, rtol=1e-6)
    assert not received(buffers)[5:8].any()
    assert buffers.gates is not None
    assert (buffers.gates.sites[:8, 0] > 0).tolist() == [False] * 5 + [True] * 3
    buffers.gates.values[:, :8] = 1.0
    uses = {use.gate: (use.tokens, use.lowered) for use in runtime.gate_report("a")}
    assert uses == {soft.digest.hex(): (0, 1), hard.digest.hex(): (3, 0)}
