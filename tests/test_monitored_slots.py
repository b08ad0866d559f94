"""A monitor before slots: they come to what the same spec comes to with the monitor's gate written into it."""

from typing import Any

import pytest

from kinds_cases import H, resolve, vector
from trimtab.program.codec import decode, encode
from trimtab.program.lowering import contents_of
from trimtab.program.monitor import behind, monitor_of, reaches
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate, VectorReference
from trimtab.sites import HookPoint, Site
from trimtab.vectors.probe import Probe

PLACES = tuple(Site(layer, HookPoint.POST_BLOCK) for layer in (0, 2, 4))
NAMES = {"calm": vector(1, PLACES), "joy": vector(2, PLACES)}
ANGER = Probe.at(Site(2, HookPoint.MLP_IN), [1.0] * H)
GATE = {"probe": ANGER, "threshold": 0.5, "sharpness": 2.0}
OWN = {"probe": Probe.at(Site(0, HookPoint.PRE_ATTN), [2.0] * H), "threshold": 0.0}
NAMED = VectorReference(MONITOR_LABEL, ANGER.vector.digest)
MONITOR = ResolvedGate.of(ANGER.vector, 0.5, 2.0, reference=NAMED, label=MONITOR_LABEL)

PREFILL, DECODE = {"phase": "prefill"}, {"phase": "decode"}
EARLY, LATE = {"layers": [0]}, {"layers": [2, 4]}


def ablate(**more: Any) -> dict[str, Any]:
    return {"kind": "ablate", "vector": "calm", **more}


def swap(**more: Any) -> dict[str, Any]:
    return {"kind": "swap", "vector": "joy", "to": "calm", **more}


EQUAL = {
    "a slot on both sides of the probe's site": (
        [ablate()], [ablate(**PREFILL), ablate(**DECODE, **EARLY), ablate(**DECODE, **LATE, gate=GATE)],
    ),
    "one behind a gate of its own": ([ablate(gate=OWN)], [ablate(gate=OWN)]),
    "one behind an equal gate already": ([ablate(**LATE, gate=GATE)], [ablate(**LATE, gate=GATE)]),
    "slots and sums": (
        [swap(), ablate(**LATE), {"kind": "add", "vector": "joy", **DECODE}],
        [swap(**PREFILL), swap(**DECODE, **EARLY), swap(**DECODE, **LATE, gate=GATE),
         ablate(**PREFILL, **LATE), ablate(**DECODE, **LATE, gate=GATE),
         {"kind": "add", "vector": "joy", **DECODE, **EARLY},
         {"kind": "add", "vector": "joy", **DECODE, **LATE, "gate": GATE}],
    ),
}  # fmt: skip


def acts(steps: list[dict[str, Any]], monitored: bool) -> list[Any]:
    """All that is done in each phase, by site: rows are split otherwise where a monitor splits a slot."""
    steering = resolve(*steps, names=NAMES)
    steering = behind(steering, MONITOR) if monitored else steering
    found: list[Any] = []
    for program in steering.programs:
        done = []
        for slot in program.slots:
            gate = b"" if slot.gate is None else slot.gate.digest
            for site, numbers in slot.numbers:
                rows = [way.values((site,)).tobytes() for way in slot.directions]
                done.append((str(site), slot.response, numbers, rows, gate))
        terms = [(term.scale, term.gate and term.gate.digest, term.vector.digest) for term in program.all_terms]
        found.append((sorted(done, key=repr), sorted(terms, key=repr)))
    return found


@pytest.mark.parametrize("case", EQUAL)
def test_a_monitor_is_a_gate_written_into_the_spec(case: str) -> None:
    plain, written_out = EQUAL[case]
    steering = behind(resolve(*plain, names=NAMES), MONITOR)
    assert acts(plain, True) == acts(written_out, False)
    again = behind(steering, MONITOR)
    assert again.programs == steering.programs
    wire = encode(steering)
    by_digest = {one.digest: one for one in (*NAMES.values(), ANGER.vector)}
    assert decode(wire, by_digest) == steering


def test_a_slot_that_is_split_keeps_its_rows() -> None:
    asked = resolve(ablate(), names=NAMES)
    steering = behind(asked, MONITOR)
    (row,) = {slot.read.row_key for slot in asked.slots}
    assert row in contents_of(steering, lowers=True).rows
    assert {slot.read.row_key for slot in steering.slots} == {row}
    assert [slot.sites for slot in sorted(steering.decode.slots, key=lambda slot: slot.sites)] == [
        PLACES[:1],
        PLACES[1:],
    ]


def test_what_lies_before_the_monitor_is_left_alone() -> None:
    early = resolve(ablate(**EARLY), names=NAMES)
    assert behind(early, MONITOR) is early
    assert not reaches(early, MONITOR.site)
    assert monitor_of(early) == ""
    late = resolve(ablate(), names=NAMES)
    assert reaches(late, MONITOR.site)
    steering = behind(late, MONITOR)
    assert not reaches(steering, MONITOR.site)
    assert monitor_of(steering) == MONITOR.digest.hex()
    assert steering.identity("prefill") == late.identity("prefill")
    assert steering.identity("decode") != late.identity("decode")


def test_receipts_tell_of_the_same_vectors_behind_a_monitor() -> None:
    twice = [ablate(), {"kind": "ablate", "vector": NAMES["calm"] * 2}, swap()]
    asked = resolve(*twice, {"kind": "add", "vector": "joy"}, names=NAMES)
    assert behind(asked, MONITOR).vectors == asked.vectors
    cancelled = resolve(
        swap(), {"kind": "add", "vector": "joy", "gate": GATE, **LATE, **DECODE, "scale": -1},
        {"kind": "add", "vector": "joy", **LATE, **DECODE}, names=NAMES,
    )  # fmt: skip
    steering = behind(cancelled, MONITOR)
    assert not [term for term in steering.decode.all_terms]
    assert steering.vectors == cancelled.vectors
