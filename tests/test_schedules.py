"""Schedules: what a factor is, and what becomes of it in programs, before a monitor, on the wire and in cache keys."""

import copy
import math
from typing import Any

import numpy as np
import pytest

from trimtab.errors import SteeringError
from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Spans, Term
from trimtab.program.codec import decode, encode
from trimtab.program.joint_gate import Join, JointGate, check_served, joined, lanes, schedule_of, scheduled
from trimtab.program.lowering import contents_of, placed
from trimtab.program.monitor import behind, monitor_of, reaches
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.program.schedules import Schedule
from trimtab.program.spans import IdSet
from trimtab.sites import GateLimits, HookPoint, OwnGate, Phase, Site
from trimtab.vectors.vector import SteeringVector

SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in range(4)]
V = SteeringVector({site: [1.0 + site.layer, 2.0] for site in SITES})
W = SteeringVector({SITES[2]: [1.0, 0.0]})
FADING, RISING = Schedule.decay(0.98), Schedule.ramp(0, 8)
FIRST, SECOND = (ResolvedGate.of(SteeringVector({SITES[k]: [1.0, k + 1.0]}), 0.5, 2.0) for k in (0, 1))
MONITOR = ResolvedGate.of(SteeringVector({SITES[1]: [0.0, 1.0]}), 0.25, 3.0, label=MONITOR_LABEL)


def program(*terms: Term) -> PhaseProgram:
    return PhaseProgram.of(terms)


def clock(schedule: Schedule = FADING, gate: Any = None) -> Any:
    return scheduled(gate, schedule, SITES[0], 2)


def steered(*answer: PhaseProgram, prompt: int = 3) -> ResolvedSteering:
    """Answer token i receives program i, and so do all behind the last."""
    starts = (0, *range(prompt, prompt + len(answer)))
    choices = tuple((place,) for place in range(len(starts)))
    phases = (Phase.PREFILL, *(Phase.DECODE,) * len(answer))
    return ResolvedSteering((EMPTY, *answer), spans=Spans(prompt, starts, tuple(range(len(starts))), choices, phases))


def test_a_decay_is_a_power_and_a_ramp_ends_at_one() -> None:
    assert [FADING.factor(i) for i in range(100)] == pytest.approx([0.98**i for i in range(100)], rel=1e-5)
    assert FADING.factor(0) == 1.0
    assert [RISING.factor(i) for i in range(10)] == [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1.0, 1.0, 1.0]
    assert [Schedule.ramp(2, 5).factor(i) for i in range(6)] == pytest.approx([0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    assert Schedule.decay(0.5).factor(2000) == 0.0
    assert not any(one.fault for one in (FADING, RISING, Schedule.ramp(0, 1 << 24), Schedule()))


@pytest.mark.parametrize(
    "numbers",
    [(0.1, 1, 1), (-65.0, 1, 1), (math.nan, 1, 1), (0, 1, 0), (0, 1, -1), (0, 2, 1), (0, -1e9, 1), (0, 1, 1e9),
     (0, 1, math.inf), (-0.1, 1, 1)],
)  # fmt: skip
def test_numbers_that_no_request_has_are_a_fault(numbers: tuple[float, float, float]) -> None:
    assert Schedule(*numbers).fault


def test_a_schedule_multiplies_the_factor_of_the_gate_that_it_stands_behind() -> None:
    assert lanes(clock()) == [(clock(), 0.0)]
    both = clock(gate=FIRST)
    assert isinstance(both, JointGate)
    assert [code for _, code in lanes(both)] == [0.0, 1.0]
    either = clock(gate=joined(Join.ANY, [SECOND, FIRST]))
    assert [code for _, code in lanes(either)] == [0.0, -1.0, 1.0]
    assert lanes(either)[-1][0].site == SECOND.site, "it is read where the last probe is"
    assert len({one.digest for one in (both, either, clock(), clock(RISING), FIRST, clock(RISING, FIRST))}) == 6
    assert (schedule_of(either), schedule_of(FIRST), schedule_of(None)) == (FADING, None, None)
    with pytest.raises(SteeringError, match="two schedules"):
        clock(RISING, clock())
    with pytest.raises(SteeringError, match="has a schedule at post_block:0"):
        joined(Join.ALL, [SECOND, clock()])


def test_what_a_row_can_hold_alone_has_its_schedule_and_no_lane() -> None:
    fading = Term(V, 2.0, gate=clock())
    alone = placed(steered(program(fading)), lowers=False)[1]
    assert (alone.schedule, alone.gated) == (FADING, ())
    assert alone.row == program(Term(V, 2.0))
    found = placed(steered(program(fading, Term(W, 1.0))), lowers=True)[1]
    assert (found.schedule, [item.gate for item in found.gated]) == (None, [clock()])
    found = placed(steered(program(fading, Term(W, 1.0, gate=clock(RISING)))), lowers=True)[1]
    assert {found.schedule, *(item.gate.schedule for item in found.gated)} == {FADING, RISING}
    gated = placed(steered(program(fading, Term(W, 1.0, gate=FIRST))), lowers=False)[1]
    assert (gated.schedule, [item.gate for item in gated.gated]) == (FADING, [FIRST])
    assert (program(fading).lane_count, program(fading, Term(W, 1.0)).lane_count) == (0, 1)
    assert contents_of(steered(program(fading)), lowers=True).probes == frozenset()
    assert contents_of(steered(program(fading)), lowers=True).rows == {V.digest}


def test_a_schedule_alone_needs_no_gate_and_one_beside_others_does() -> None:
    steered(program(Term(V, 1.0, gate=clock()))).check_gate_count(GateLimits(), "x")
    mixed = steered(program(Term(V, 1.0, gate=clock()), Term(W, 1.0)))
    with pytest.raises(SteeringError, match="so does a `schedule`"):
        mixed.check_gate_count(GateLimits(), "x")
    mixed.check_gate_count(GateLimits(1), "x")
    steered(program(*(Term(V, 1.0, gate=clock(one)) for one in (FADING, RISING)))).check_gate_count(GateLimits(1), "x")


def test_a_schedule_is_one_of_answers_by_spans() -> None:
    fading = program(Term(V, 1.0, gate=clock()))
    with pytest.raises(ValueError, match="by spans"):
        ResolvedSteering((EMPTY, fading))
    spans = Spans(3, (0, 3), (0, 1), ((0,), (1,)), (Phase.PREFILL, Phase.DECODE))
    with pytest.raises(ValueError, match="by spans"):
        ResolvedSteering((fading, EMPTY), spans=spans)


def test_a_run_that_follows_a_schedule_is_named_by_where_the_answer_begins() -> None:
    plain, fading, other = (program(Term(V, 1.0, gate=gate)) for gate in (None, clock(), clock(RISING)))
    for prompt in (3, 4):
        runs = steered(EMPTY, EMPTY, fading, fading, plain, prompt=prompt).runs
        assert runs == ((prompt + 2, f"{fading.identity}#2"), (prompt + 4, plain.identity))
    assert len({plain.identity, fading.identity, other.identity}) == 3
    spans = Spans(3, (0, 3), (0, 1), ((0,), (1, 2)), (Phase.PREFILL, Phase.DECODE, Phase.DECODE), (IdSet(((0, 5),)),))
    decided = [ResolvedSteering((EMPTY, EMPTY, one), spans=spans).runs[0][1] for one in (plain, fading)]
    assert all(name.endswith("#0") for name in decided)
    assert decided[0] != decided[1]


def test_before_a_monitor_what_fades_goes_on_fading() -> None:
    steering = steered(program(Term(V, 2.0, gate=clock()), Term(W, 1.0, gate=FIRST)))
    assert reaches(steering, MONITOR.site)
    monitored = behind(steering, MONITOR)
    early = SteeringVector({SITES[0]: V.directions[SITES[0]]})
    late = SteeringVector({site: V.directions[site] for site in SITES[1:]})
    both = joined(Join.ALL, [MONITOR, scheduled(MONITOR, FADING, SITES[0], 2).members[-1]])
    wanted = [Term(early, 2.0, gate=clock()), Term(late, 2.0, gate=both), Term(W, 1.0, gate=FIRST)]
    assert monitored.programs[1] == program(*wanted)
    assert monitor_of(monitored) == MONITOR.digest.hex()
    assert not reaches(monitored, MONITOR.site)


def test_behind_a_monitor_a_schedule_counts_as_one_gate_and_is_read_where_the_monitor_is() -> None:
    own = OwnGate(MONITOR.digest, MONITOR.site)
    monitored = behind(steered(program(Term(V, 2.0, gate=clock()))), MONITOR)
    for gate in monitored.gates:
        check_served(gate, SITES[1:], GateLimits(2, frozenset(SITES[:1]), monitor=own))
    late = behind(steered(program(Term(W, 2.0, gate=clock()))), MONITOR)
    late.check_gate_count(GateLimits(1, frozenset(SITES[:1]), monitor=own), "x")
    with pytest.raises(SteeringError, match="has 1 different gates"):
        late.check_gate_count(GateLimits(0, monitor=own), "x")
    both = behind(steered(program(Term(W, 2.0, gate=clock()), Term(W, 1.0))), MONITOR)
    both.check_gate_count(GateLimits(2, frozenset(SITES[:1]), monitor=own), "x")
    with pytest.raises(SteeringError, match="has 2 different gates"):
        both.check_gate_count(GateLimits(1, frozenset(SITES[:1]), monitor=own), "x")


STEERING = steered(program(Term(V, 2.0, gate=clock())), program(Term(W, 1.0, gate=clock(RISING, FIRST))))


def test_schedules_travel() -> None:
    back = decode(encode(STEERING), {})
    assert back == STEERING
    assert back.runs == STEERING.runs
    assert [gate.digest for gate in back.gates] == [gate.digest for gate in STEERING.gates]


@pytest.mark.parametrize(
    ("place", "value", "field"),
    [
        ([0], [0], "[0]"),
        ([0], [0, "nowhere"], "[0]"),
        ([1], 3, "[1]"),
        ([1], True, "[1]"),
        ([2], [0.0, 1.0], "[2]"),
        ([2, 0], 1.0, "[2]"),
        ([2, 0], "a", "[2][0]"),
        ([2, 2], 0.0, "[2]"),
        ([2, 2], math.inf, "[2][2]"),
    ],
)
def test_a_malformed_schedule_is_refused_where_the_fault_stands(place: list[int], value: Any, field: str) -> None:
    wire: Any = copy.deepcopy(encode(STEERING))
    index = next(i for i, gate in enumerate(wire["gates"]) if len(gate) == 3)
    inner = wire["gates"][index]
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(SteeringError) as refusal:
        decode(wire, {})
    assert refusal.value.field == f"wire.gates[{index}]{field}"


def test_a_wire_of_endless_schedules_or_one_without_spans_is_refused() -> None:
    wire: Any = copy.deepcopy(encode(STEERING))
    with pytest.raises(SteeringError, match=r"wire\.gates: has 1025 items"):
        decode(wire | {"gates": wire["gates"][:1] * 1025}, {})
    wire["spans"], wire["programs"], wire["acting"] = None, wire["programs"][:2], [[], []]
    with pytest.raises(SteeringError, match=r"wire\.programs: a schedule is one of tokens of an answer"):
        decode(wire, {})


def test_a_float32_of_a_factor_is_what_the_formula_gives() -> None:
    places = np.arange(3000, dtype=np.float32)
    for schedule in (FADING, RISING, Schedule.ramp(5, 12), Schedule.decay(0.9999)):
        rate, offset, length = map(np.float32, schedule)
        found = np.exp2(rate * places) * np.clip((places + offset) / length, 0, 1)
        assert found == pytest.approx([schedule.factor(i) for i in range(3000)], rel=1e-5, abs=1e-30)
