"""The form in which resolved steering travels between processes: plain dicts, lists, bytes and numbers, for msgpack.

    {"version": 5, "vectors": [VECTOR, ...], "gates": [GATE, ...], "directions": [DIRECTION, ...], "slots": [SLOT, ...],
     "programs": [[TERM, ...], ...], "acting": [[slot index, ...], ...], "spans": SPANS | None}
    of each of `ResolvedSteering.programs` its terms, and its slots; without spans there is one for each phase
    TERM = [vector index, scale], or [vector index, scale, gate index]
    SLOT = [response, direction index of what it reads | None, of what it writes | None, NUMBERS, gate index | None],
           or [..., direction index of its second score]
    NUMBERS = [[[[layer, hook], ...], [bias, numbers of the response ...]], ...], None for all sites of its direction
    DIRECTION = [[vector index, weight, whether at unit length], ...], a sum, or [..., form]
    GATE = [vector index of its probe, threshold, sharpness (0 = hard), invert, label ("" = none)],
           or ["all" | "any", [GATE of one probe, ...]], or [[layer, hook], width, [rate, offset, length]], a schedule
    VECTOR = {"name": str, "digest": bytes, "layers": [int, ...] | None}                   a registered vector,
           | {..., "hooks": [hook, ...]}                                                   at these hook points
           | {..., "part": [layer, hook, whether before]}                                  on one side of a site
           | {"sites": [[layer, hook], ...], "width": int, "data": bytes}                  little-endian float32 [n, H],
           | {..., "spread": True}                                                         or [1, H] for all sites
    SPANS = {"prompt_length": int, "starts": [int, ...], "kinds": [int, ...], "choices": [[program index, ...], ...],
             "phases": ["prefill" | "decode", ...], "atoms": [ATOM, ...]}                  as `Spans` has them
    ATOM = ["ids", [[first, end], ...]]
           | ["between", [[id, ...], ...] that open, [[id, ...], ...] that close, whether open at first, looks back]

The reader trusts nothing: digests of inline content are computed anew, registered ones are looked up by digest. What a
request called its slots does not travel: it is no part of what they do.
"""

from collections.abc import Container, Mapping
from typing import Any

from trimtab.errors import SteeringError
from trimtab.program.joint_gate import MOST_MEMBERS, Condition, Join, JointGate, check_gate, joined
from trimtab.program.programs import PhaseProgram, Term
from trimtab.program.resolved import SPANS, ResolvedSteering
from trimtab.program.resolved_gate import ResolvedGate, VectorReference
from trimtab.program.schedules import Schedule
from trimtab.program.slots import Slot
from trimtab.program.wire_slots import decode_direction, decode_slot, encode_slot, form_told
from trimtab.program.wire_spans import decode_spans, encode_spans
from trimtab.program.wire_values import check_keys, index_of, list_of, number_of, parts_of, site_of, truth_of
from trimtab.program.wire_vectors import Known, decode_vector, encode_vector
from trimtab.sites import MOST_SLOTS_OF_PHASE
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown

VERSION = 5
GATES_READ = 1024  # more than interventions can have; one that is a schedule says little and has a vector's numbers
LONGEST_LABEL = 200  # characters, as of the names that a spec may have
SLOTS_READ = 2 * MOST_SLOTS_OF_PHASE  # of a program, whose slots are split where a monitor begins
KEYS = frozenset({"version", "vectors", "gates", "directions", "slots", "programs", "acting", "spans"})


def encode(steering: ResolvedSteering, held: Container[bytes] | None = None, *, views: bool = False) -> dict[str, Any]:
    """The wire form; each vector is in it once, whichever phases use it.

    A vector with a name is referred to by its digest where that is in `held`, the digests that the reader knows (None:
    he knows all), and sent as content elsewhere. With `views`, content that no one can write to is not copied: it is a
    memoryview of the vector's own numbers, which msgpack takes as bytes too, but pickle and deepcopy do not.
    """
    vectors: list[dict[str, Any]] = []
    places: dict[bytes, int] = {}

    def place(vector: SteeringVector, reference: VectorReference | None) -> int:
        if vector.digest not in places:
            places[vector.digest] = len(vectors)
            known = reference is not None and (held is None or reference.digest in held)
            vectors.append(encode_vector(vector, reference if known else None, views))
        return places[vector.digest]

    gates = {gate.digest: index for index, gate in enumerate(steering.gates)}

    def gate_told(gate: Condition) -> list[Any]:
        if isinstance(gate, JointGate):
            return [gate.join.value, [gate_told(member) for member in gate.members]]
        if gate.schedule is not None:
            return [[gate.site.layer, gate.site.hook.value], gate.probe.hidden_size, list(gate.schedule)]
        return [place(gate.probe, gate.reference), gate.threshold, gate.sharpness, gate.invert, gate.label]

    encoded = [gate_told(gate) for gate in steering.gates]
    slots = {slot.digest: slot for slot in steering.slots}
    ways = {way.row_key: way for slot in slots.values() for way in slot.directions}
    directions = [
        [*([place(part.vector, reference), part.weight, part.unit] for part, reference in way.told), *form_told(way)]
        for way in ways.values()
    ]

    def terms(program: PhaseProgram) -> list[list[Any]]:
        entries: list[list[Any]] = []
        for term in program.all_terms:
            gate = [] if term.gate is None else [gates[term.gate.digest]]
            entries.append([place(term.vector, term.reference), term.scale, *gate])
        return entries

    order = list(slots)
    return {
        "version": VERSION,
        "vectors": vectors,
        "gates": encoded,
        "directions": directions,
        "slots": [encode_slot(slot, list(ways), gates) for slot in slots.values()],
        "programs": [terms(program) for program in steering.programs],
        "acting": [[order.index(slot.digest) for slot in program.slots] for program in steering.programs],
        "spans": encode_spans(steering.spans),
    }


def decode(wire: Any, vectors_by_digest: Mapping[bytes, SteeringVector]) -> ResolvedSteering:
    """The steering of a wire form. Raises `SteeringError` where it is malformed or names an unknown vector.

    `vectors_by_digest` holds the directions of registered probes too.
    """
    check_keys(wire, "wire", KEYS)
    if type(wire["version"]) is not int or wire["version"] != VERSION:
        raise SteeringError("wire.version", f"got {shown(wire['version'])}, this release reads version {VERSION}")
    entries = {key: list_of(wire[key], f"wire.{key}") for key in sorted(KEYS - {"version", "spans"})}
    vectors = [
        decode_vector(entry, f"wire.vectors[{i}]", vectors_by_digest) for i, entry in enumerate(entries["vectors"])
    ]
    if len({vector.hidden_size for vector, _ in vectors}) > 1:
        raise SteeringError("wire.vectors", "the vectors have different widths")
    if (count := len(entries["gates"])) > GATES_READ:
        raise SteeringError("wire.gates", f"has {count} items, at most {GATES_READ} are read")
    gates = [_decode_condition(entry, f"wire.gates[{i}]", vectors) for i, entry in enumerate(entries["gates"])]
    ways = [decode_direction(entry, f"wire.directions[{i}]", vectors) for i, entry in enumerate(entries["directions"])]
    slots = [decode_slot(entry, f"wire.slots[{i}]", ways, gates) for i, entry in enumerate(entries["slots"])]
    spans = decode_spans(wire["spans"], "wire.spans")
    wanted = len(SPANS) if spans is None else len(spans.phases)
    for key in ("programs", "acting"):
        if (count := len(entries[key])) != wanted:
            each = f"one for each of {', '.join(SPANS)}" if spans is None else f"{wanted}, as many as spans.phases has"
            raise SteeringError(f"wire.{key}", f"has {count} items, want {each}")
    read = [
        (
            _decode_terms(entries["programs"][i], f"wire.programs[{i}]", len(vectors), len(gates)),
            _decode_acting(entries["acting"][i], f"wire.acting[{i}]", len(slots)),
        )
        for i in range(wanted)
    ]
    programs: list[PhaseProgram] = []
    for i, found in enumerate(read):
        first = read.index(found)  # mostly all are alike, and then one object
        programs.append(programs[first] if first < i else _program(found, f"wire.programs[{i}]", vectors, gates, slots))
    try:
        return ResolvedSteering(tuple(programs), spans=spans)
    except ValueError as error:
        raise SteeringError("wire.programs", str(error)) from None


def _decode_condition(entry: Any, path: str, vectors: list[Known]) -> Condition:
    parts = list_of(entry, path)
    if len(parts) != 2:
        return _decode_gate(entry, path, vectors)
    if not isinstance(parts[0], str) or parts[0] not in Join.__members__.values():
        raise SteeringError(f"{path}[0]", f"got {shown(parts[0])}, want one of {', '.join(Join)}")
    members = list_of(parts[1], f"{path}[1]")
    if not 1 < len(members) <= MOST_MEMBERS:
        raise SteeringError(f"{path}[1]", f"has {len(members)} gates, want 2 to {MOST_MEMBERS}")
    try:
        return joined(Join(parts[0]), [_decode_gate(one, f"{path}[1][{i}]", vectors) for i, one in enumerate(members)])
    except SteeringError as error:
        raise SteeringError(error.field or f"{path}[1]", error.message) from None


def _decode_gate(entry: Any, path: str, vectors: list[Known]) -> ResolvedGate:
    if isinstance(entry, (list, tuple)) and len(entry) == 3 and isinstance(entry[0], (list, tuple)):
        return _decode_clock(list(entry), path, vectors)
    parts = parts_of(entry, path, "vector index", "threshold", "sharpness", "invert", "label")
    index, threshold, sharpness, invert, label = parts
    probe, reference = vectors[index_of(index, len(vectors), "vectors", f"{path}[0]")]
    threshold, sharpness = number_of(threshold, f"{path}[1]"), number_of(sharpness, f"{path}[2]")
    truth_of(invert, f"{path}[3]")
    if not isinstance(label, str) or len(label) > LONGEST_LABEL:
        raise SteeringError(f"{path}[4]", f"got {shown(label)}, want a string of at most {LONGEST_LABEL} characters")
    try:
        return ResolvedGate.of(probe, threshold, sharpness or None, invert, reference, label)
    except SteeringError as error:
        raise SteeringError(path, f"{error.field}: {error.message}") from None


def _decode_clock(parts: list[Any], path: str, vectors: list[Known]) -> ResolvedGate:
    site, width = site_of(parts[0], f"{path}[0]"), parts[1]
    if type(width) is not int or width not in {vector.hidden_size for vector, _ in vectors[:1]}:
        raise SteeringError(f"{path}[1]", f"got {shown(width)}, want the width of the vectors")
    numbers = parts_of(parts[2], f"{path}[2]", "rate", "offset", "length")
    schedule = Schedule(*(number_of(number, f"{path}[2][{i}]") for i, number in enumerate(numbers)))
    if fault := schedule.fault:
        raise SteeringError(f"{path}[2]", fault)
    return ResolvedGate.clock(schedule, site, width)


Terms = list[tuple[int, float, int | None]]  # places of vectors, scales, and places of gates


def _decode_terms(entry: Any, path: str, vectors: int, gates: int) -> Terms:
    """The terms of one program, of so many vectors and gates."""
    terms: Terms = []
    for i, item in enumerate(list_of(entry, path)):
        parts = list_of(item, f"{path}[{i}]")
        if len(parts) not in (2, 3):
            raise SteeringError(
                f"{path}[{i}]", f"has {len(parts)} items, want [vector index, scale] or a gate index too"
            )
        vector = index_of(parts[0], vectors, "vectors", f"{path}[{i}][0]")
        scale = number_of(parts[1], f"{path}[{i}][1]")
        gate = index_of(parts[2], gates, "gates", f"{path}[{i}][2]") if len(parts) == 3 else None
        terms.append((vector, scale, gate))
    return terms


def _decode_acting(entry: Any, path: str, slots: int) -> list[int]:
    """The places of the slots of one program."""
    items = list_of(entry, path)
    if len(items) > SLOTS_READ:
        raise SteeringError(path, f"has {len(items)} slots, at most {SLOTS_READ} are read")
    return [index_of(item, slots, "slots", f"{path}[{i}]") for i, item in enumerate(items)]


def _program(
    found: tuple[Terms, list[int]], path: str, vectors: list[Known], gates: list[Condition], slots: list[Slot]
) -> PhaseProgram:
    terms: list[Term] = []
    for i, (vector, scale, gate) in enumerate(found[0]):
        term = Term(vectors[vector][0], scale, vectors[vector][1], None if gate is None else gates[gate])
        if term.gate is not None:
            try:
                check_gate(term.gate, term.sites, term.hidden_size)
            except SteeringError as error:
                raise SteeringError(f"{path}[{i}][2]", error.message) from None
        terms.append(term)
    try:
        return PhaseProgram.of(terms, (slots[index] for index in found[1]))
    except SteeringError as error:
        raise SteeringError(path, error.message) from None
