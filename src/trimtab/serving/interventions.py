"""What each intervention of a request did, as its receipt tells: on how many tokens it acted, and what its slots made.

Tokens are positions, counted as `steered_tokens` counts them. Corrections are measured where they are made: one for
each computed token, site and slot. A slot in which several interventions are joined is told of under each of them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.program import Asked, ResolvedSteering, Where
from trimtab.program.counting import SlotUse, received
from trimtab.program.slots import measured_slots

MISSING = "the workers did not answer in time"


@dataclass(frozen=True)
class Corrections:
    """What the slots of an intervention did: c, which is what a slot's response says times its gate."""

    measured: int | None  # numbers c: one for each token, site and slot; None where it is not known
    mean: float | None  # of |c|; None where that is no finite number, or nothing was measured
    touched: float | None  # the share of c that was not 0; None where nothing was measured


@dataclass(frozen=True)
class InterventionUse:
    """What one intervention did. `corrections` are None for one that only adds, and where they are not known."""

    asked: Asked
    tokens: int
    corrections: Corrections | None = None

    def as_json(self) -> dict[str, Any]:
        """In JSON's types, as docs/serving.md describes it."""
        told = {
            "index": self.asked.place,
            "kind": self.asked.kind,
            "vectors": [{"name": origin.name, "digest": origin.digest.hex()} for origin in self.asked.vectors],
            **({"server_default": True} if self.asked.by_default else {}),
            **({} if self.asked.where is None else {"where": where_json(self.asked.where)}),
            "tokens": self.tokens,
        }
        return told if self.corrections is None else {**told, **corrections_json(self.corrections)}


_UNKNOWN = Corrections(None, None, None)


def corrections_json(corrections: Corrections) -> dict[str, Any]:
    """What is told of corrections in JSON's types."""
    return {
        "measured": corrections.measured,
        "mean_correction": corrections.mean,
        "touched": corrections.touched,
    }


def where_json(where: Where) -> dict[str, Any]:
    """Where an intervention acts, in JSON's types."""
    told = {"prompt": [*map(list, where.prompt)], "answer": [*map(list, where.answer)]}
    return told | ({"by_tokens": True} if where.by_tokens else {})


def tokens_of(
    steering: ResolvedSteering, prompt_length: int, new_tokens: int, tokens: Sequence[int] | None = None
) -> list[int]:
    """On how many tokens of an output each intervention of `steering.asked` acted; `tokens` are those of `received`."""
    counts = received(steering, prompt_length, new_tokens, tokens)
    return [sum(counts[place] for place in places) for places in steering.asked_in]


def slots_of(steering: ResolvedSteering) -> list[set[tuple[str, str]]]:
    """The phase and the digest of each slot that an intervention of `steering.asked` has a part in."""
    found: list[set[tuple[str, str]]] = [set() for _ in steering.asked]
    for phase, program in zip(steering.phases, steering.programs, strict=True):
        asked_by: dict[bytes, set[int]] = {}
        for slot in program.slots:
            asked_by.setdefault(slot.digest, set()).update(slot.asked_by)
        for slot in measured_slots(program.slots):
            for index in asked_by[slot.digest]:
                found[index].add((str(phase), slot.digest.hex()))
    return found


def corrections_of(slots: Sequence[set[tuple[str, str]]], uses: Iterable[SlotUse]) -> list[Corrections | None]:
    """For each intervention with these slots, what they did; None where it has none."""
    by_slot: dict[tuple[str, str], list[SlotUse]] = {}
    for use in uses:
        by_slot.setdefault((use.phase, use.slot), []).append(use)
    return [_corrections([use for key in own for use in by_slot.get(key, ())]) if own else None for own in slots]


def uses_of(
    steering: ResolvedSteering,
    prompt_length: int,
    new_tokens: int,
    uses: Iterable[SlotUse] | None,
    tokens: Sequence[int] | None = None,
) -> tuple[InterventionUse, ...]:
    """What each intervention did to an output; `uses` are of its slots, None where they are not known."""
    counts = tokens_of(steering, prompt_length, new_tokens, tokens)
    known = [None] * len(counts) if uses is None else corrections_of(slots_of(steering), uses)
    return tuple(InterventionUse(*one) for one in zip(steering.asked, counts, known, strict=True))


def with_corrections(
    told: Mapping[str, Any], slots: Sequence[set[tuple[str, str]]], uses: Iterable[SlotUse] | None
) -> dict[str, Any]:
    """A receipt in JSON's types with what its slots did; None says that this is not known."""
    missing = {} if uses is not None else {"corrections_missing": MISSING}
    known = corrections_of(slots, uses or ())
    entries = [
        entry if own is None else {**entry, **corrections_json(_UNKNOWN if missing else own)}
        for entry, own in zip(told["interventions"], known, strict=True)
    ]
    return {**told, "interventions": entries, **missing}


def _corrections(uses: Sequence[SlotUse]) -> Corrections:
    measured = sum(use.measured for use in uses)
    if not measured:
        return Corrections(0, None, None)
    mean = math.fsum(use.total for use in uses) / measured
    return Corrections(measured, mean if math.isfinite(mean) else None, sum(use.moved for use in uses) / measured)
