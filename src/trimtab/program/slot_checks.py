"""What a slot must be to be computed, and to travel: one check for what a kind comes down to and for what was sent."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from trimtab.errors import SteeringError
from trimtab.program.ranges import MAX_VALUE
from trimtab.program.slots import Direction, Form, Numbers, Part, Slot
from trimtab.responses import REPLACE, RESPONSES, Response, Stage
from trimtab.sites import site_order

MOST_PARTS = 8  # of a direction


def check_slot(slot: Slot) -> None:
    """Raise `SteeringError` for a slot that cannot be computed or sent, at the name of the number that is wrong, if one
    is."""
    if (response := RESPONSES.get(slot.response)) is None:
        raise SteeringError("", f"has a slot with the response {slot.response!r}, want one of {', '.join(RESPONSES)}")
    if (fault := _fault_of_ways(slot, response) or _fault_of_sites(slot)) is not None:
        raise SteeringError("", fault)
    for own in {id(numbers): numbers for _, numbers in slot.numbers}.values():  # mostly all sites share one
        _check_numbers(response, own)


def fault_of_numbers(response: Response, values: Sequence[float]) -> tuple[str, str] | None:
    """Which of a slot's numbers, its bias first, is wrong, and what is wrong with it; None if nothing is.

    The name is "" where it is two of them together.
    """
    named = dict(zip(("bias", *response.numbers), values, strict=True))
    for name, value in named.items():
        bound = name in response.bounds
        if not abs(value) <= MAX_VALUE and not (bound and abs(value) == math.inf):
            return name, f"got {value:g}, want a number up to {MAX_VALUE:g}{', or an infinite bound' if bound else ''}"
    if response.bounds:
        low, high = (named[name] for name in response.bounds)
        if low > high or low == math.inf or high == -math.inf:
            return "", f"the bounds {low:g} and {high:g} of a {response.name} hold nothing"
    if response is REPLACE and not 0.0 < named["amount"] <= 1.0:
        return "amount", f"replaces {named['amount']:g} of the stream, want more than 0 and at most 1"
    return None


def fault_of_part(part: Part) -> str | None:
    """What is wrong with a part of a direction; None if nothing is."""
    if abs(part.weight) * (1.0 if part.unit else part.vector.max_abs) <= MAX_VALUE:
        return None
    return f"got the weight {part.weight:g}: numbers exceed {MAX_VALUE:g}"


def fault_of_parts(direction: Direction) -> str | None:
    """What is wrong with the parts of a direction together; None if nothing is."""
    count = len(direction.parts)
    if not 0 < count <= MOST_PARTS:
        return f"has {count} parts, want 1 to {MOST_PARTS}"
    if direction.form is Form.ORTHOGONAL and count != 2:
        return f"has {count} parts, want 2 of one direction that is orthogonal to another"
    return None


def _check_numbers(response: Response, own: Numbers) -> None:
    values = (own.bias, *own.own)
    if len(own.own) != len(response.numbers):
        wanted = ", ".join(("bias", *response.numbers))
        raise SteeringError("", f"has a slot with {len(values)} numbers; those of a {response.name} are {wanted}")
    if (found := fault_of_numbers(response, values)) is not None:
        raise SteeringError(*found)
    if any(float(np.float32(value)) != value for value in values):
        raise SteeringError("", f"has a slot with numbers that are not float32: {own}; `Numbers.of` rounds them")


def _fault_of_ways(slot: Slot, response: Response) -> str | None:
    """What is wrong with the directions and the gate of a slot."""
    name, read, write = slot.response, slot.read, slot.write
    if response.stage is Stage.LAST and (read, write, slot.gate) != (None, None, None):
        return f"{name} reads and writes no direction, and has no gate"
    if response.stage is Stage.FIRST and (read is not None or write is None):
        return f"{name} reads no direction, and writes one"
    if response.reads_float32 and (read is None or write is None):
        return f"{name} reads one direction and writes another"
    if response.stage is Stage.LOCAL and read is write is None:
        return "neither reads nor writes"
    for way in (way for way in (read, write, slot.second) if way is not None):
        if (fault := fault_of_parts(way) or next(filter(None, map(fault_of_part, way.parts)), None)) is not None:
            return fault
        first = way.parts[0].vector
        if any(part.vector.sites != first.sites for part in way.parts[1:]):
            return "has a direction of vectors that act at different sites"
        if response is not REPLACE and way.zero_at:
            return f"has a direction that is zero at {way.zero_at[0]}"
    return None


def _fault_of_sites(slot: Slot) -> str | None:
    """What is wrong with where a slot acts."""
    sites = slot.sites
    for way in (way for way in (slot.read, slot.write, slot.second) if way is not None and way.sites != sites):
        if outside := set(sites).difference(way.sites):
            return f"acts at {min(outside, key=site_order)}, where its direction has no site"
    if not sites:
        return "names no site"
    if not slot.directions or slot.directions[0].sites != sites:
        orders = [site_order(site) for site in sites]
        if any(one >= other for one, other in itertools.pairwise(orders)):
            return "names its sites out of order, or one of them twice"
    return None
