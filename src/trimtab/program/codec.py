"""The form in which resolved steering travels between processes: plain dicts, lists, bytes and numbers, for msgpack.

    {"version": 2, "vectors": [VECTOR, ...], "gates": [GATE, ...], "programs": [[TERM, ...], ...]}
    a program for each phase, as `ResolvedSteering.programs` has them
    TERM = [vector index, scale], or [vector index, scale, gate index]
    GATE = [vector index of its probe, threshold, sharpness (0 = hard), invert, label ("" = none)]
    VECTOR = {"name": str, "digest": bytes, "layers": [int, ...] | None}                   a registered vector,
           | {..., "part": [layer, hook, whether before]}                                  on one side of a site
           | {"sites": [[layer, hook], ...], "width": int, "data": bytes}                  little-endian float32 [n, H]

The reader trusts nothing: digests of inline content are computed anew, registered ones are looked up by digest.
"""

from collections.abc import Container, Mapping, Set
from typing import Any

import numpy as np

from trimtab.errors import SteeringError
from trimtab.program import SPANS, PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import ResolvedGate, VectorReference, check_gate
from trimtab.sites import LAYERS_BELOW, HookPoint, Site
from trimtab.vectors.values import FloatArray
from trimtab.vectors.vector import Part, SteeringVector
from trimtab.wording import shown

VERSION = 2
LARGEST_FLOAT64 = float(np.finfo(np.float64).max)
WIDTHS_BELOW = 1 << 31
LONGEST_LABEL = 128  # characters, as of the names that can be registered
KEYS = frozenset({"version", "vectors", "gates", "programs"})


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
            vectors.append(_encode_vector(vector, reference if known else None, views))
        return places[vector.digest]

    gates = {gate.digest: index for index, gate in enumerate(steering.gates)}
    encoded = [[place(g.probe, g.reference), g.threshold, g.sharpness, g.invert, g.label] for g in steering.gates]

    def terms(program: PhaseProgram) -> list[list[Any]]:
        entries: list[list[Any]] = []
        for term in program.all_terms:
            gate = [] if term.gate is None else [gates[term.gate.digest]]
            entries.append([place(term.vector, term.reference), term.scale, *gate])
        return entries

    programs = [terms(program) for program in steering.programs]
    return {"version": VERSION, "vectors": vectors, "gates": encoded, "programs": programs}


def decode(wire: Any, vectors_by_digest: Mapping[bytes, SteeringVector]) -> ResolvedSteering:
    """The steering of a wire form. Raises `SteeringError` where it is malformed or names an unknown vector.

    `vectors_by_digest` holds the directions of registered probes too.
    """
    _keys(wire, "wire", KEYS)
    if type(wire["version"]) is not int or wire["version"] != VERSION:
        raise SteeringError("wire.version", f"got {shown(wire['version'])}, this release reads version {VERSION}")
    entries = _list(wire["vectors"], "wire.vectors")
    vectors = [_decode_vector(entry, f"wire.vectors[{i}]", vectors_by_digest) for i, entry in enumerate(entries)]
    if len({vector.hidden_size for vector, _ in vectors}) > 1:
        raise SteeringError("wire.vectors", "the vectors have different widths")
    gates = [
        _decode_gate(entry, f"wire.gates[{i}]", vectors) for i, entry in enumerate(_list(wire["gates"], "wire.gates"))
    ]
    entries = _list(wire["programs"], "wire.programs")
    if len(entries) != len(SPANS):
        raise SteeringError("wire.programs", f"has {len(entries)} items, want one for each of {', '.join(SPANS)}")
    read = [_decode_terms(entry, f"wire.programs[{i}]", vectors, gates) for i, entry in enumerate(entries)]
    programs: list[PhaseProgram] = []
    for i, terms in enumerate(read):
        first = read.index(terms)  # mostly all are alike, and then one object
        programs.append(programs[first] if first < i else _program(terms, f"wire.programs[{i}]", vectors, gates))
    return ResolvedSteering(tuple(programs))


def _encode_vector(vector: SteeringVector, reference: VectorReference | None, views: bool) -> dict[str, Any]:
    if reference is not None:
        layers = None if reference.layers is None else list(reference.layers)
        named: dict[str, Any] = {"name": reference.name, "digest": reference.digest, "layers": layers}
        if (part := reference.part) is not None:
            named["part"] = [part.site.layer, part.site.hook.value, part.before]
        return named
    sites = [[site.layer, site.hook.value] for site in vector.sites]
    data = vector.block.astype("<f4", copy=False).data.cast("B")
    views = views and _sealed(vector.block)  # what is sent must be what was named by its digest
    return {"sites": sites, "width": vector.hidden_size, "data": data if views else bytes(data)}


def _sealed(block: FloatArray) -> bool:
    """Whether the array that `block` is a view of is read-only too, so that no one can write to its numbers."""
    return isinstance(block.base, np.ndarray) and not block.base.flags.writeable


def _decode_vector(
    entry: Any, path: str, vectors_by_digest: Mapping[bytes, SteeringVector]
) -> tuple[SteeringVector, VectorReference | None]:
    if isinstance(entry, Mapping) and "name" in entry:
        return _decode_reference(entry, path, vectors_by_digest)
    _keys(entry, path, {"sites", "width", "data"})
    sites = [_site(site, f"{path}.sites[{i}]") for i, site in enumerate(_list(entry["sites"], f"{path}.sites"))]
    width, data = entry["width"], entry["data"]
    if type(width) is not int or not 0 < width < WIDTHS_BELOW:
        raise SteeringError(f"{path}.width", f"got {shown(width)}, want a whole number above 0")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise SteeringError(f"{path}.data", f"got {type(data).__name__}, want bytes")
    size = memoryview(data).nbytes
    if not sites or size != 4 * width * len(sites):
        raise SteeringError(f"{path}.data", f"has {size} bytes, want {4 * width * len(sites)} for its sites and width")
    block = np.frombuffer(bytes(data), dtype="<f4").reshape(len(sites), width)
    return SteeringVector.from_block(sites, block, field=path), None


def _decode_reference(
    entry: Mapping[str, Any], path: str, vectors_by_digest: Mapping[bytes, SteeringVector]
) -> tuple[SteeringVector, VectorReference]:
    _keys(entry, path, {"name", "digest", "layers", "part"} if "part" in entry else {"name", "digest", "layers"})
    name, digest, layers = entry["name"], entry["digest"], entry["layers"]
    if not isinstance(name, str):
        raise SteeringError(f"{path}.name", f"got {type(name).__name__}, want a string")
    if not isinstance(digest, bytes) or (vector := vectors_by_digest.get(digest)) is None:
        shown = digest.hex()[:16] if isinstance(digest, bytes) else type(digest).__name__
        raise SteeringError(f"{path}.digest", f"vector {name!r:.80} ({shown}) is not registered in this process")
    chosen = None
    if layers is not None:
        chosen = tuple(_layer(layer, f"{path}.layers[{i}]") for i, layer in enumerate(_list(layers, f"{path}.layers")))
        try:
            vector = vector.at(chosen)
        except SteeringError as error:
            raise SteeringError(f"{path}.layers", error.message) from None
    if "part" not in entry:
        return vector, VectorReference(name, digest, chosen)
    part = _part(entry["part"], f"{path}.part")
    if (kept := vector.part(part)) is None:
        side = "before it" if part.before else "from it on"
        raise SteeringError(f"{path}.part", f"vector {name!r:.80} has no site {side}: {part.site}")
    return kept, VectorReference(name, digest, chosen, part)


def _decode_gate(entry: Any, path: str, vectors: list[tuple[SteeringVector, VectorReference | None]]) -> ResolvedGate:
    parts = _list(entry, path)
    if len(parts) != 5:
        raise SteeringError(path, f"has {len(parts)} items, want [vector index, threshold, sharpness, invert, label]")
    index, threshold, sharpness, invert, label = parts
    probe, reference = vectors[_index(index, len(vectors), "vectors", f"{path}[0]")]
    threshold, sharpness = _number(threshold, f"{path}[1]"), _number(sharpness, f"{path}[2]")
    if type(invert) is not bool:
        raise SteeringError(f"{path}[3]", f"got {shown(invert)}, want true or false")
    if not isinstance(label, str) or len(label) > LONGEST_LABEL:
        raise SteeringError(f"{path}[4]", f"got {shown(label)}, want a string of at most {LONGEST_LABEL} characters")
    try:
        return ResolvedGate.of(probe, threshold, sharpness or None, invert, reference, label)
    except SteeringError as error:
        raise SteeringError(path, f"{error.field}: {error.message}") from None


def _decode_terms(
    entries: Any,
    path: str,
    vectors: list[tuple[SteeringVector, VectorReference | None]],
    gates: list[ResolvedGate],
) -> list[tuple[int, float, int | None]]:
    """Places of vectors, scales, and places of gates, of one program."""
    terms: list[tuple[int, float, int | None]] = []
    for i, entry in enumerate(_list(entries, path)):
        parts = _list(entry, f"{path}[{i}]")
        if len(parts) not in (2, 3):
            raise SteeringError(
                f"{path}[{i}]", f"has {len(parts)} items, want [vector index, scale] and perhaps a gate"
            )
        vector = _index(parts[0], len(vectors), "vectors", f"{path}[{i}][0]")
        scale = _number(parts[1], f"{path}[{i}][1]")
        gate = _index(parts[2], len(gates), "gates", f"{path}[{i}][2]") if len(parts) == 3 else None
        if gate is not None:
            try:
                check_gate(gates[gate], vectors[vector][0].sites, vectors[vector][0].hidden_size)
            except SteeringError as error:
                raise SteeringError(f"{path}[{i}][2]", error.message) from None
        terms.append((vector, scale, gate))
    return terms


def _program(
    terms: list[tuple[int, float, int | None]],
    path: str,
    vectors: list[tuple[SteeringVector, VectorReference | None]],
    gates: list[ResolvedGate],
) -> PhaseProgram:
    try:
        return PhaseProgram.of(
            Term(vectors[vector][0], scale, vectors[vector][1], None if gate is None else gates[gate])
            for vector, scale, gate in terms
        )
    except SteeringError as error:
        raise SteeringError(path, error.message) from None


def _index(value: Any, count: int, what: str, path: str) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise SteeringError(path, f"got {shown(value)}, want the index of one of {count} {what}")
    return value


def _number(value: Any, path: str) -> float:
    if type(value) not in (float, int) or not abs(value) <= LARGEST_FLOAT64:  # float32 cannot hold every merged scale
        raise SteeringError(path, f"got {shown(value)}, want a finite number")
    return float(value)


def _keys(entry: Any, path: str, wanted: Set[str]) -> None:
    if not isinstance(entry, Mapping):
        raise SteeringError(path, f"got {type(entry).__name__}, want an object with {', '.join(sorted(wanted))}")
    if set(entry) != wanted:
        raise SteeringError(path, f"has the keys {sorted(map(str, entry))}, want {sorted(wanted)}")


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise SteeringError(path, f"got {type(value).__name__}, want a list")
    return list(value)


def _layer(value: Any, path: str) -> int:
    if type(value) is not int or not 0 <= value < LAYERS_BELOW:
        raise SteeringError(path, f"got {shown(value)}, want a layer, a whole number from 0")
    return value


def _part(value: Any, path: str) -> Part:
    parts = _list(value, path)
    if len(parts) != 3 or type(parts[2]) is not bool:
        raise SteeringError(path, f"got {shown(value)}, want [layer, hook, whether before]")
    return Part(_site(parts[:2], path), parts[2])


def _site(value: Any, path: str) -> Site:
    pair = _list(value, path)
    if len(pair) != 2 or not isinstance(pair[1], str) or pair[1] not in HookPoint.__members__.values():
        raise SteeringError(path, f"got {shown(value)}, want [layer, hook]")
    return Site(_layer(pair[0], f"{path}[0]"), HookPoint(pair[1]))
