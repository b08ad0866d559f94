"""How slots and their directions travel between processes: see `trimtab.program.codec`."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import SteeringError
from trimtab.program.joint_gate import Condition, check_gate
from trimtab.program.slot_checks import check_slot, fault_of_numbers, fault_of_part, fault_of_parts
from trimtab.program.slots import Direction, Form, Numbers, Part, Slot
from trimtab.program.wire_values import index_of, list_of, number_of, parts_of, site_of, truth_of
from trimtab.program.wire_vectors import Known
from trimtab.responses import RESPONSES
from trimtab.sites import Site, site_order
from trimtab.wording import shown


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
    parts: list[Part] = []
    references = []
    for i, item in enumerate(entries):
        index, weight, unit = parts_of(item, f"{path}[{i}]", "vector index", "weight", "whether at unit length")
        vector, reference = vectors[index_of(index, len(vectors), "vectors", f"{path}[{i}][0]")]
        part = Part(vector, number_of(weight, f"{path}[{i}][1]"), truth_of(unit, f"{path}[{i}][2]"))
        if (fault := fault_of_part(part)) is not None:
            raise SteeringError(f"{path}[{i}][1]", fault)
        if parts and vector.sites != parts[0].vector.sites:
            raise SteeringError(f"{path}[{i}][0]", "its vector has other sites than the first")
        parts.append(part)
        references.append(reference)
    direction = Direction(tuple(parts), tuple(references), form)
    if (fault := fault_of_parts(direction)) is not None:
        raise SteeringError(path, fault)
    return direction


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
    everywhere = next((way.sites for way in ways if way is not None), ())
    told = _decode_numbers(numbers, f"{path}[3]", response, everywhere)
    behind = None if gate is None else gates[index_of(gate, len(gates), "gates", f"{path}[4]")]
    numbers = tuple((site, told[site]) for site in sorted(told, key=site_order))
    slot = Slot(response, ways[0], ways[1], numbers, behind, second=ways[2])
    try:
        check_slot(slot)
    except SteeringError as error:
        raise SteeringError(path, error.message) from None
    if behind is not None:
        try:
            check_gate(behind, slot.sites, slot.hidden_size)
        except SteeringError as error:
            raise SteeringError(f"{path}[4]", error.message) from None
    return slot


def _decode_numbers(entry: Any, path: str, response: str, everywhere: Sequence[Site]) -> dict[Site, Numbers]:
    found: dict[Site, Numbers] = {}
    names = ("bias", *RESPONSES[response].numbers)
    for i, item in enumerate(list_of(entry, path)):
        sites, given = parts_of(item, f"{path}[{i}]", "sites", "numbers")
        values = parts_of(given, f"{path}[{i}][1]", *names)
        for j, value in enumerate(values):
            if type(value) is not float:
                number_of(value, f"{path}[{i}][1][{j}]")
        if (fault := fault_of_numbers(RESPONSES[response], values)) is not None:
            place = f"[{names.index(fault[0])}]" if fault[0] else ""
            raise SteeringError(f"{path}[{i}][1]{place}", fault[1])
        numbers = Numbers.of(*values)
        for j, site in enumerate(everywhere if sites is None else _sites(sites, f"{path}[{i}][0]")):
            if site in found:
                raise SteeringError(f"{path}[{i}][0][{j}]", f"{site} is given twice")
            found[site] = numbers
    if not found:
        raise SteeringError(path, "names no site")
    return found


def _sites(entry: Any, path: str) -> list[Site]:
    return [site_of(item, f"{path}[{i}]") for i, item in enumerate(list_of(entry, path))]
