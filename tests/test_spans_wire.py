"""Between processes: the runs of a request come back the same, and what is no cover of positions is refused."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SteeringError
from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Spans, Term
from trimtab.program.codec import decode, encode
from trimtab.program.spans import (
    IDS_BELOW,
    LONGEST_SEQUENCE,
    MOST_ATOMS,
    MOST_ID_RANGES,
    MOST_KINDS,
    MOST_PROGRAMS,
    MOST_RUNS,
    MOST_SEQUENCES,
    POSITIONS_BELOW,
    Between,
    IdSet,
)  # fmt: skip
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors import SteeringVector

P, D = Phase.PREFILL, Phase.DECODE
VECTOR = SteeringVector({Site(0, HookPoint.POST_BLOCK): [1.0, 2.0]})
ONE, TWO = (PhaseProgram.of([Term(VECTOR, scale)]) for scale in (1.0, 2.0))
SPANS = Spans(
    5,
    (0, 2, 5, 9),
    (0, 1, 2, 3),
    ((0,), (1,), (2, 3, 2, 2), (2,)),
    (P, P, D, D),
    (IdSet(((0, 4), (7, IDS_BELOW))), Between(((1, 2), (3,)), ((4,),), is_open=True, looks_back=True)),
)
STEERING = ResolvedSteering((ONE, EMPTY, EMPTY, TWO), spans=SPANS)
BASE: dict[str, Any] = encode(STEERING)


def plain(value: Any) -> Any:
    """What msgpack makes of it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    assert value is None or type(value) in (bool, int, float, str, bytes), f"{type(value)} is no msgpack type"
    return value


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    wire: dict[str, Any] = plain(copy.deepcopy(BASE))
    place: Any = wire
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return wire


def test_spans_come_back_the_same_and_travel_on() -> None:
    back = decode(plain(BASE), {})
    assert back == STEERING
    assert back.spans == SPANS
    assert plain(encode(back)) == plain(BASE)
    assert [back.identity(phase) for phase in Phase] == [STEERING.identity(phase) for phase in Phase]
    assert back.runs == STEERING.runs


def test_steering_without_spans_says_so() -> None:
    wire = encode(ResolvedSteering((ONE, TWO)))
    assert wire["spans"] is None
    assert decode(plain(wire), {}).spans is None


def test_a_form_of_the_version_before_is_refused() -> None:
    with pytest.raises(SteeringError, match=r"wire\.version: got 4, this release reads version 5"):
        decode(changed(["version"], 4), {})


HERE = "wire.spans"
LONG = [["ids", [[2 * k, 2 * k + 1] for k in range(MOST_ID_RANGES + 1)]]]
MALFORMED: dict[str, tuple[list[Any], Any, str]] = {
    "no object": (["spans"], [], HERE),
    "true": (["spans"], True, HERE),
    "a key more": (["spans", "more"], 1, HERE),
    "no prompt": (["spans", "prompt_length"], 0, HERE),
    "a prompt that ends in a run": (["spans", "prompt_length"], 4, HERE),
    "prompt true": (["spans", "prompt_length"], True, f"{HERE}.prompt_length"),
    "a prompt of 5,000 digits": (["spans", "prompt_length"], 10**5000, f"{HERE}.prompt_length"),
    "starts in no order": (["spans", "starts"], [0, 5, 2, 9], HERE),
    "starts twice": (["spans", "starts"], [0, 5, 5, 9], HERE),
    "not from 0": (["spans", "starts"], [1, 2, 5, 9], HERE),
    "no starts": (["spans", "starts"], [], HERE),
    "a start is text": (["spans", "starts", 1], "2", f"{HERE}.starts[1]"),
    "a start is true": (["spans", "starts", 1], True, f"{HERE}.starts[1]"),
    "a start below 0": (["spans", "starts", 0], -1, f"{HERE}.starts[0]"),
    "a start that no int32 holds": (["spans", "starts", 3], POSITIONS_BELOW, f"{HERE}.starts[3]"),
    "too many starts": (["spans", "starts"], list(range(MOST_RUNS + 1)), f"{HERE}.starts"),
    "starts are text": (["spans", "starts"], "0259", f"{HERE}.starts"),
    "a kind too few": (["spans", "kinds"], [0, 1, 2], HERE),
    "an unknown kind": (["spans", "kinds", 3], 4, f"{HERE}.kinds[3]"),
    "a kind below 0": (["spans", "kinds", 3], -1, f"{HERE}.kinds[3]"),
    "too many kinds": (["spans", "choices"], [[0]] * (MOST_KINDS + 1), f"{HERE}.choices"),
    "a choice of none": (["spans", "choices", 3], [], HERE),
    "a choice of half": (["spans", "choices", 2], [2, 3], HERE),
    "a choice of too many": (["spans", "choices", 2], [2] * 17, f"{HERE}.choices[2]"),
    "a choice of no list": (["spans", "choices", 2], 2, f"{HERE}.choices[2]"),
    "an unknown program": (["spans", "choices", 3], [4], f"{HERE}.choices[3][0]"),
    "a decided prompt": (["spans", "kinds", 0], 2, HERE),
    "a prompt's program in the answer": (["spans", "choices", 3], [0], HERE),
    "an answer's program in the prompt": (["spans", "choices", 0], [2], HERE),
    "an unknown phase": (["spans", "phases", 0], "all", f"{HERE}.phases[0]"),
    "a phase of a number": (["spans", "phases", 0], 0, f"{HERE}.phases[0]"),
    "a phase too many": (["spans", "phases"], ["prefill", "prefill", "decode", "decode", "decode"], "wire.programs"),
    "too many programs": (["spans", "phases"], ["decode"] * (MOST_PROGRAMS + 1), f"{HERE}.phases"),
    "programs of phases alone": (["spans"], None, "wire.programs"),
    "too many atoms": (["spans", "atoms"], [["ids", [[0, 1]]]] * (MOST_ATOMS + 1), f"{HERE}.atoms"),
    "an atom of no kind": (["spans", "atoms", 0], [], f"{HERE}.atoms[0]"),
    "an unknown atom": (["spans", "atoms", 0], ["odd", []], f"{HERE}.atoms[0]"),
    "an atom in words": (["spans", "atoms", 0], "ids", f"{HERE}.atoms[0]"),
    "no ids": (["spans", "atoms", 0], ["ids", []], HERE),
    "ids in no order": (["spans", "atoms", 0], ["ids", [[4, 5], [0, 1]]], HERE),
    "ids that touch": (["spans", "atoms", 0], ["ids", [[0, 1], [1, 2]]], HERE),
    "an empty range": (["spans", "atoms", 0], ["ids", [[1, 1]]], HERE),
    "a range of one": (["spans", "atoms", 0], ["ids", [[1]]], f"{HERE}.atoms[0][1][0]"),
    "an id below 0": (["spans", "atoms", 0], ["ids", [[-1, 2]]], f"{HERE}.atoms[0][1][0][0]"),
    "an id of no int32": (["spans", "atoms", 0], ["ids", [[1, IDS_BELOW + 1]]], f"{HERE}.atoms[0][1][0][1]"),
    "too many ranges": (["spans", "atoms", 0], LONG[0], f"{HERE}.atoms[0][1]"),
    "nothing opens or closes": (["spans", "atoms", 1], ["between", [], [], True, True], HERE),
    "an empty sequence": (["spans", "atoms", 1], ["between", [[]], [], True, True], HERE),
    "a long sequence": (
        ["spans", "atoms", 1],
        ["between", [[1] * (LONGEST_SEQUENCE + 1)], [], True, True],
        f"{HERE}.atoms[1][1][0]",
    ),
    "too many sequences": (
        ["spans", "atoms", 1],
        ["between", [], [[1]] * (MOST_SEQUENCES + 1), True, True],
        f"{HERE}.atoms[1][2]",
    ),
    "a sequence of text": (["spans", "atoms", 1], ["between", [["a"]], [], True, True], f"{HERE}.atoms[1][1][0][0]"),
    "an id that is none": (["spans", "atoms", 1], ["between", [[-1]], [], True, True], f"{HERE}.atoms[1][1][0][0]"),
    "open by a number": (["spans", "atoms", 1], ["between", [[1]], [], 1, True], f"{HERE}.atoms[1][3]"),
    "looking back by a number": (["spans", "atoms", 1], ["between", [[1]], [], True, 0], f"{HERE}.atoms[1][4]"),
    "an atom that lacks a part": (["spans", "atoms", 1], ["between", [[1]], [], True], f"{HERE}.atoms[1]"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_no_cover_of_positions_is_refused_where_the_fault_stands(case: str) -> None:
    path, value, field = MALFORMED[case]
    with pytest.raises(SteeringError) as refusal:
        decode(changed(path, value), {})
    assert refusal.value.field == field
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("key", ["programs", "acting"])
def test_there_are_as_many_programs_as_the_spans_say(key: str) -> None:
    for entries in ([], BASE[key][:-1], [*BASE[key], []]):
        with pytest.raises(SteeringError, match=r"want 4, as many as spans\.phases has") as refusal:
            decode(changed([key], entries), {})
        assert refusal.value.field == f"wire.{key}"


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.integers()
    | st.floats()
    | st.sampled_from(["ids", "between", "decode", "prefill", b"x"]),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(BASE["spans"])), junk))
@settings(max_examples=300, deadline=None)
def test_any_spans_are_read_or_refused(given_spans: dict[str, Any]) -> None:
    wire = plain(copy.deepcopy(BASE))
    wire["spans"] |= given_spans
    try:
        back = decode(wire, {})
    except SteeringError:
        return
    assert decode(plain(encode(back)), {}) == back
