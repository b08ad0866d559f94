"""Programs with slots: direction rows, row keys, identities, and the rows that a request holds."""

from dataclasses import replace

import numpy as np
import pytest

from trimtab.program import EMPTY, Direction, Numbers, PhaseProgram, ResolvedSteering, Slot, Term
from trimtab.program.lowering import contents_of, placed
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.slots import Part
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector

H = 24
FIRST, SECOND, THIRD = (Site(layer, HookPoint.POST_BLOCK) for layer in (1, 2, 5))
RANDOM = np.random.default_rng(11)


def vector(*sites: Site, scale: float = 1.0) -> SteeringVector:
    return SteeringVector({site: RANDOM.normal(size=H) * scale for site in sites or (FIRST, SECOND)})


def unit(*vectors: SteeringVector) -> Direction:
    """The first less the others, each at unit length."""
    return Direction(tuple(Part(one, 1.0 if index == 0 else -1.0) for index, one in enumerate(vectors)))


def clip(
    along: SteeringVector,
    low: float = 0.0,
    high: float = 0.0,
    strength: float = 1.0,
    gate: ResolvedGate | None = None,
    to: SteeringVector | None = None,
) -> Slot:
    numbers = tuple((site, Numbers.of(0.0, strength, low, high)) for site in along.sites)
    return Slot("clip", unit(along), None if to is None else unit(to, along), numbers, gate, "clamp")


def gate(threshold: float = 0.5, site: Site = FIRST) -> ResolvedGate:
    return ResolvedGate.of(SteeringVector({site: np.ones(H)}), threshold, 2.0)


CALM, REFUSAL, JOY = vector(), vector(), vector()


@pytest.mark.parametrize("scale", [1e-36, 1e-3, 1.0, 7.0, 1e30])
def test_a_direction_row_is_the_unit_vector_in_a_unit_that_fills_float16(scale: float) -> None:
    along = vector(FIRST, SECOND, scale=scale)
    direction = unit(along)
    row = direction.row((SECOND, THIRD, FIRST)).astype(np.float64) * direction.unit
    wanted = along.block.astype(np.float64)
    wanted /= np.sqrt((wanted**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(row[[2, 0]], wanted, rtol=2**-23, atol=0)
    assert not row[1].any()
    largest = np.abs(direction.row(along.sites)).max()
    assert 65504 / 2 <= largest <= 65504
    assert np.frexp(direction.unit)[0] == 0.5


def test_a_difference_of_unit_vectors_is_taken_in_float64_and_rounded_once() -> None:
    near = SteeringVector({site: row + np.float32(1e-4) for site, row in CALM.directions.items()})
    direction = unit(near, CALM)
    units = [one.block.astype(np.float64) for one in (near, CALM)]
    units = [one / np.sqrt((one**2).sum(axis=1, keepdims=True)) for one in units]
    row = direction.row(CALM.sites).astype(np.float64) * direction.unit
    wanted = units[0] - units[1]
    np.testing.assert_allclose(row, wanted, rtol=2**-23, atol=np.abs(wanted).max() * 2**-45)


def test_rows_are_written_where_they_are_wanted() -> None:
    out = np.full((2, H), 5, np.float32)
    assert unit(CALM).row((THIRD, FIRST), out) is out
    np.testing.assert_array_equal(out, unit(CALM).row((THIRD, FIRST)))


def test_a_program_of_slots_alone_has_a_row_of_its_own_that_adds_nothing() -> None:
    program = PhaseProgram.of([], [clip(REFUSAL)])
    assert (len(program.row_key), program.terms, program.sites) == (32, (), REFUSAL.sites)
    assert not program.row((FIRST, THIRD)).any()
    assert program.row((FIRST, THIRD)).shape == (2, H)
    assert program.coefficient == 1.0  # times zero: whoever looks for steered tokens by it finds them
    assert len(program.identity) == 64


def test_requests_without_slots_are_named_as_before_there_were_any() -> None:
    """Blocks of an earlier release are found again by these names."""
    rows = SteeringVector({FIRST: np.arange(H), SECOND: -np.arange(H)})
    other = SteeringVector({SECOND: np.ones(H)})
    behind = ResolvedGate.of(SteeringVector({FIRST: np.ones(H)}), 0.5, 2.0)
    found = [
        PhaseProgram.of(terms).identity
        for terms in (
            [],
            [Term(rows, 2.0)],
            [Term(rows, 2.0), Term(other, -1.0)],
            [Term(rows, 2.0), Term(other, -1.0, gate=behind)],
        )
    ]
    assert found == IDENTITIES


IDENTITIES = [
    "",
    "a0507664793c8d5b72c34f37fe020e2c89b66662e73a738610593a356c70c0b8",
    "6ba22f51488c59083b9eca2a93695ea748c7ef5001656b7ccec1e306da4f8274",
    "6014cd1e682ccbec066a0b408720ceec5069e5a73657ef238008b060e524b972",
]


def test_the_order_in_which_slots_are_written_changes_nothing() -> None:
    slots = [clip(CALM, -1, 1), clip(REFUSAL), clip(JOY, 2, 3, 0.5, gate()), clip(CALM, to=JOY)]
    terms = [Term(CALM, 1.0), Term(JOY, 2.0, gate=gate(0.25))]
    one, other = PhaseProgram.of(terms, slots), PhaseProgram.of(terms[::-1], slots[::-1])
    assert one == other
    assert (one.identity, one.row_key) == (other.identity, other.row_key)
    assert [slot.digest for slot in one.slots] == sorted(slot.digest for slot in slots)


CHANGES = {
    "response's strength": {"numbers": ((FIRST, Numbers.of(0.0, 0.5, -1.0, 1.0)),)},
    "low": {"numbers": ((FIRST, Numbers.of(0.0, 1.0, -2.0, 1.0)),)},
    "high": {"numbers": ((FIRST, Numbers.of(0.0, 1.0, -1.0, np.inf)),)},
    "bias": {"numbers": ((FIRST, Numbers.of(0.25, 1.0, -1.0, 1.0)),)},
    "site": {"numbers": ((SECOND, Numbers.of(0.0, 1.0, -1.0, 1.0)),)},
    "one more site": {"numbers": tuple((site, Numbers.of(0.0, 1.0, -1.0, 1.0)) for site in (FIRST, SECOND))},
    "what it reads": {"read": unit(REFUSAL)},
    "what it writes": {"write": unit(REFUSAL)},
    "what it writes, of the same vectors": {"write": unit(CALM, REFUSAL)},
    "what it writes, the other way": {"write": unit(REFUSAL, CALM)},
    "length": {"read": Direction((Part(CALM, 1.0, unit=False),))},
    "weight": {"read": Direction((Part(CALM, 0.5),))},
    "read nothing": {"read": None, "write": unit(CALM)},
    "gate": {"gate": gate()},
    "threshold of the gate": {"gate": gate(0.75)},
}


def test_programs_that_do_different_things_have_different_names() -> None:
    plain = Slot("clip", unit(CALM), None, ((FIRST, Numbers.of(0.0, 1.0, -1.0, 1.0)),))
    changed = [plain, *(replace(plain, **change) for change in CHANGES.values())]
    programs = [
        PhaseProgram.of(terms, [slot]) for slot in changed for terms in ([], [Term(JOY, 1.0)], [Term(JOY, 2.0)])
    ]
    programs += [PhaseProgram.of([], [plain, clip(JOY, to=CALM)]), PhaseProgram.of([Term(JOY, 1.0)]), EMPTY]
    assert len({program.identity for program in programs}) == len(programs)
    rows = {program.row_key for program in programs}
    assert len(rows) == 2 * len(changed) + 3  # every scale of one vector shares its row


def test_what_reports_say_is_no_part_of_what_is_done() -> None:
    slot = clip(CALM)
    other = replace(slot, kind="ablate", path="interventions[3]")
    assert PhaseProgram.of([], [slot]).identity == PhaseProgram.of([], [other]).identity


def test_gates_that_only_slots_have_are_gates_of_the_program() -> None:
    shared, own, of_terms = gate(0.1), gate(0.2), gate(0.3)
    slots = [clip(CALM, gate=shared), clip(REFUSAL, gate=own)]
    program = PhaseProgram.of([Term(JOY, 1.0, gate=shared), Term(JOY, 1.0, gate=of_terms)], slots)
    assert [item.gate for item in program.gated] == sorted([shared, own, of_terms], key=lambda one: one.digest)
    totals = {item.gate.digest: item.total for item in program.gated}
    assert totals[own.digest] == EMPTY
    assert [term.vector for term in totals[shared.digest].terms] == [JOY]
    assert ResolvedSteering((program, EMPTY)).gates == tuple(item.gate for item in program.gated)


def test_a_request_holds_the_rows_of_its_directions_once() -> None:
    slots = [clip(CALM, -1, 1), clip(REFUSAL), clip(CALM, to=JOY)]
    program = PhaseProgram.of([Term(CALM, 1.0)], slots)
    steering = ResolvedSteering((program, PhaseProgram.of([], [clip(CALM)])))
    wanted = {program.row_key, steering.decode.row_key, unit(CALM).row_key, unit(REFUSAL).row_key}
    for lowers in (False, True):
        assert contents_of(steering, lowers=lowers).rows == wanted | {unit(JOY, CALM).row_key}


def test_a_program_with_slots_keeps_its_gates_in_lanes() -> None:
    monitored = gate(site=FIRST)
    terms = [Term(vector(FIRST), 1.0, gate=monitored)]
    for slots, lanes in (([], 0), ([clip(CALM)], 1)):
        steering = ResolvedSteering((EMPTY, PhaseProgram.of(terms, slots)))
        assert len(placed(steering, lowers=True)[1].gated) == lanes


def test_widths_that_differ_are_refused() -> None:
    narrow = SteeringVector({FIRST: np.ones(H - 1)})
    for terms, slots in (([Term(narrow, 1.0)], [clip(CALM)]), ([], [clip(narrow), clip(CALM)])):
        with pytest.raises(ValueError, match="different widths"):
            PhaseProgram.of(terms, slots)


def test_a_row_key_tells_the_lanes_of_its_slots() -> None:
    """A row's record says which lane gates a slot, and other gates of a program move it: such rows are not shared."""
    one, other = sorted([gate(0.5), gate(0.75)], key=lambda gate: gate.digest)
    slot = clip(REFUSAL, gate=other)
    alone, behind = PhaseProgram.of((), [slot]), PhaseProgram.of([Term(CALM, 1.0, gate=one)], [slot])
    assert [item.gate for item in alone.gated] == [other]
    assert [item.gate for item in behind.gated] == [one, other]
    assert alone.row_key != behind.row_key
    last = PhaseProgram.of([Term(CALM, 1.0, gate=other)], [slot])  # the same lane: one row
    assert last.row_key == alone.row_key
    assert last.identity != alone.identity
