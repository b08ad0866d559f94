"""How slots and their directions travel between processes: see `trimtab.program.codec`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import SteeringError
from trimtab.program.joint_gate import Condition, check_gate
from trimtab.program.ranges import MAX_VALUE
from trimtab.program.slots import Direction, Form, Numbers, Part, Slot
from trimtab.program.wire_values import index_of, list_of, number_of, parts_of, site_of, truth_of
from trimtab.program.wire_vectors import Known
from trimtab.responses import CLIP, FEATURE, REPLACE, RESPONSES, Stage
from trimtab.sites import Site, site_order
from trimtab.wording import shown

MOST_PARTS = 8  # of a direction


def encode_slot(slot: Slot, directions: Sequence[bytes], gates: Mapping[bytes, int]) -> list[Any]:
    """The form of a slot; `directions` are the row keys, and `gates` the places of digests."""
    read, write, second = (
        None if way is None else directions.index(way.row_key) for way in (slot.read, slot.write, slot.second)
    )
    sites_of: dict[Numbers, list[Site]] = {}  # mostly all are alike
    for site, numbers in slot.numbers:
        sites_of.setdefault(numbers, []).append(site)
    everywhere = len(sites_of) == 1 and slot.sites in [way.sites for way in slot.directions[:1]]
    numbers_of = [
        [None if everywhere else [[site.layer, site.hook.value] for site in sites], [numbers.bias, *numbers.own]]
        for numbers, sites in sites_of.items()
    ]
    gate = None if slot.gate is None else gates[slot.gate.digest]
    return [slot.response, read, write, numbers_of, gate, *([] if second is None else [second])]


def form_told(direction: Direction) -> list[str]:
    """What the form of a direction says behind its parts."""
    return [] if direction.form is Form.SUM else [direction.form.value]


def decode_direction(entry: Any, path: str, vectors: Sequence[Known]) -> Direction:
    """The direction of a form. Raises `SteeringError`."""
    entries, form = list_of(entry, path), Form.SUM
    if entries and isinstance(entries[-1], str):
        if entries[-1] not in Form.__members__.values():
            said = f"got {shown(entries[-1])}, want one of {', '.join(Form)}"
            raise SteeringError(f"{path}[{len(entries) - 1}]", said)
        form = Form(entries.pop())
    if not 0 < len(entries) <= MOST_PARTS:
        raise SteeringError(path, f"has {len(entries)} parts, want 1 to {MOST_PARTS}")
    parts: list[Part] = []
    references = []
    for i, item in enumerate(entries):
        index, weight, unit = parts_of(item, f"{path}[{i}]", "vector index", "weight", "whether at unit length")
        vector, reference = vectors[index_of(index, len(vectors), "vectors", f"{path}[{i}][0]")]
        weight, unit = number_of(weight, f"{path}[{i}][1]"), truth_of(unit, f"{path}[{i}][2]")
        if abs(weight) * (1.0 if unit else vector.max_abs) > MAX_VALUE:
            raise SteeringError(f"{path}[{i}][1]", f"got {weight:g}: numbers exceed {MAX_VALUE:g}")
        if parts and vector.sites != parts[0].vector.sites:
            raise SteeringError(f"{path}[{i}][0]", "its vector has other sites than the first")
        parts.append(Part(vector, weight, unit))
        references.append(reference)
    if form is Form.ORTHOGONAL and len(parts) != 2:
        raise SteeringError(path, f"has {len(parts)} parts, want 2 of one direction that is orthogonal to another")
    return Direction(tuple(parts), tuple(references), form)


def decode_slot(entry: Any, path: str, directions: Sequence[Direction], gates: Sequence[Condition]) -> Slot:
    """The slot of a form. Raises `SteeringError`, for what cannot be computed too."""
    parts = list_of(entry, path)
    second = parts.pop() if len(parts) == 6 else None
    response, read, write, numbers, gate = parts_of(parts, path, "response", "read", "write", "numbers", "gate")
    if not isinstance(response, str) or response not in RESPONSES:
        raise SteeringError(f"{path}[0]", f"got {shown(response)}, want one of {', '.join(RESPONSES)}")
    ways = [
        None if way is None else directions[index_of(way, len(directions), "directions", f"{path}[{i}]")]
        for i, way in ((1, read), (2, write), (5, second))
    ]
    known = [way for way in ways if way is not None]
    if (fault := _fault_of_ways(response, read, write, gate)) is not None:
        raise SteeringError(path, fault)
    if response != REPLACE.name and (zero := [site for way in known for site in way.zero_at]):
        raise SteeringError(path, f"has a direction that is zero at {zero[0]}")
    told = _decode_numbers(numbers, f"{path}[3]", response, known[0].sites if known else ())
    for way in known:
        if outside := set(told).difference(way.sites):
            raise SteeringError(
                f"{path}[3]", f"acts at {min(outside, key=site_order)}, where its direction has no site"
            )
    behind = None if gate is None else gates[index_of(gate, len(gates), "gates", f"{path}[4]")]
    numbers = tuple((site, told[site]) for site in sorted(told, key=site_order))
    slot = Slot(response, ways[0], ways[1], numbers, behind, second=ways[2])
    if behind is not None:
        try:
            check_gate(behind, slot.sites, slot.hidden_size)
        except SteeringError as error:
            raise SteeringError(f"{path}[4]", error.message) from None
    return slot


def _decode_numbers(entry: Any, path: str, response: str, everywhere: Sequence[Site]) -> dict[Site, Numbers]:
    found: dict[Site, Numbers] = {}
    names = RESPONSES[response].numbers
    for i, item in enumerate(list_of(entry, path)):
        sites, given = parts_of(item, f"{path}[{i}]", "sites", "numbers")
        values = parts_of(given, f"{path}[{i}][1]", "bias", *names)
        for j, value in enumerate(values):
            if type(value) not in (float, int) or not (abs(value) <= MAX_VALUE or abs(value) == math.inf):
                said = f"got {shown(value)}, want a number up to {MAX_VALUE:g}, or an infinite bound"
                raise SteeringError(f"{path}[{i}][1][{j}]", said)
        numbers = Numbers.of(*map(float, values))
        if (fault := _fault_of(response, numbers)) is not None:
            raise SteeringError(f"{path}[{i}][1]", fault)
        for j, site in enumerate(everywhere if sites is None else _sites(sites, f"{path}[{i}][0]")):
            if site in found:
                raise SteeringError(f"{path}[{i}][0][{j}]", f"{site} is given twice")
            found[site] = numbers
    if not found:
        raise SteeringError(path, "names no site")
    return found


def _sites(entry: Any, path: str) -> list[Site]:
    return [site_of(item, f"{path}[{i}]") for i, item in enumerate(list_of(entry, path))]


def _fault_of_ways(response: str, read: Any, write: Any, gate: Any) -> str | None:
    """What is wrong with which directions and gate a slot has; None if nothing is."""
    stage = RESPONSES[response].stage
    if stage is Stage.LAST:
        return None if read is write is gate is None else f"{response} reads and writes no direction, and has no gate"
    if stage is Stage.FIRST:
        return None if read is None and write is not None else f"{response} reads no direction, and writes one"
    if RESPONSES[response].reads_float32:
        return f"{response} reads one direction and writes another" if read is None or write is None else None
    return "neither reads nor writes" if read is write is None else None


def _fault_of(response: str, numbers: Numbers) -> str | None:
    """What is wrong with the numbers of a slot, none of which is NaN; None if nothing is."""
    if response == CLIP.name:
        strength, low, high = numbers.own
        if not math.isfinite(strength) or not math.isfinite(numbers.bias):
            return "the bias and the strength of a clip must be finite"
        return None if _hold(low, high) else "a clip's bounds hold nothing"
    if response == FEATURE.name:
        threshold, scale, add, low, high, off = numbers.own
        if not all(map(math.isfinite, (numbers.bias, threshold, scale, add, off))):
            return "all numbers of a feature but its bounds must be finite"
        return None if _hold(low, high) else "a feature's bounds hold nothing"
    if not all(map(math.isfinite, (numbers.bias, *numbers.own))):
        return f"the numbers of {response} must be finite"
    if response == REPLACE.name and not 0.0 < numbers.own[0] <= 1.0:
        return f"replaces {numbers.own[0]:g} of the stream, want more than 0 and at most 1"
    return None


def _hold(low: float, high: float) -> bool:
    """Whether any number lies between these bounds."""
    return low <= high and low < math.inf and high > -math.inf
