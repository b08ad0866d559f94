"""The form in which resolved steering travels between processes: plain dicts, lists, bytes and numbers, for msgpack.

    {"version": 1, "vectors": [VECTOR, ...], "prefill": [[vector index, scale], ...], "decode": [...]}
    VECTOR = {"name": str, "digest": bytes, "layers": [int, ...] | None}                   a registered vector
           | {"sites": [[layer, hook], ...], "width": int, "data": bytes}                  little-endian float32 [n, H]

The reader trusts nothing: digests of inline content are computed anew, registered ones are looked up by digest.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimtab.errors import SteeringError
from trimtab.program import PhaseProgram, ResolvedSteering, Term, VectorReference, checked
from trimtab.sites import HookPoint, Site
from trimtab.vectors.values import LARGEST_FLOAT32
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown

VERSION = 1


def encode(steering: ResolvedSteering) -> dict[str, Any]:
    """The wire form; each vector is in it once, whichever phases use it."""
    vectors: list[dict[str, Any]] = []
    places: dict[bytes, int] = {}

    def phase(program: PhaseProgram) -> list[list[Any]]:
        entries: list[list[Any]] = []
        for term in program.terms:
            if term.vector.digest not in places:
                places[term.vector.digest] = len(vectors)
                vectors.append(_encode_vector(term))
            entries.append([places[term.vector.digest], term.scale])
        return entries

    prefill, decode = phase(steering.prefill), phase(steering.decode)
    return {"version": VERSION, "vectors": vectors, "prefill": prefill, "decode": decode}


def decode(wire: Any, vectors_by_digest: Mapping[bytes, SteeringVector]) -> ResolvedSteering:
    """The steering of a wire form. Raises `SteeringError` where it is malformed or names an unknown vector."""
    _keys(wire, "wire", {"version", "vectors", "prefill", "decode"})
    if type(wire["version"]) is not int or wire["version"] != VERSION:
        raise SteeringError("wire.version", f"got {shown(wire['version'])}, this release reads version {VERSION}")
    entries = _list(wire["vectors"], "wire.vectors")
    vectors = [_decode_vector(entry, f"wire.vectors[{i}]", vectors_by_digest) for i, entry in enumerate(entries)]
    if len({vector.hidden_size for vector, _ in vectors}) > 1:
        raise SteeringError("wire.vectors", "the vectors have different widths")
    prefill = _decode_phase(wire["prefill"], "wire.prefill", vectors)
    if wire["decode"] == wire["prefill"]:
        return ResolvedSteering(prefill, prefill)
    return ResolvedSteering(prefill, _decode_phase(wire["decode"], "wire.decode", vectors))


def _encode_vector(term: Term) -> dict[str, Any]:
    if (reference := term.reference) is not None:
        layers = None if reference.layers is None else list(reference.layers)
        return {"name": reference.name, "digest": reference.digest, "layers": layers}
    vector = term.vector
    return {
        "sites": [[site.layer, site.hook.value] for site in vector.sites],
        "width": vector.hidden_size,
        "data": vector.block.astype("<f4", copy=False).tobytes(),
    }


def _decode_vector(
    entry: Any, path: str, vectors_by_digest: Mapping[bytes, SteeringVector]
) -> tuple[SteeringVector, VectorReference | None]:
    if isinstance(entry, Mapping) and "name" in entry:
        return _decode_reference(entry, path, vectors_by_digest)
    _keys(entry, path, {"sites", "width", "data"})
    sites = [_site(site, f"{path}.sites[{i}]") for i, site in enumerate(_list(entry["sites"], f"{path}.sites"))]
    width, data = entry["width"], entry["data"]
    if type(width) is not int or width < 1:
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
    _keys(entry, path, {"name", "digest", "layers"})
    name, digest, layers = entry["name"], entry["digest"], entry["layers"]
    if not isinstance(name, str):
        raise SteeringError(f"{path}.name", f"got {type(name).__name__}, want a string")
    if not isinstance(digest, bytes) or (vector := vectors_by_digest.get(digest)) is None:
        shown = digest.hex()[:16] if isinstance(digest, bytes) else type(digest).__name__
        raise SteeringError(f"{path}.digest", f"vector {name!r:.80} ({shown}) is not registered in this process")
    if layers is None:
        return vector, VectorReference(name, digest)
    chosen = tuple(_layer(layer, f"{path}.layers[{i}]") for i, layer in enumerate(_list(layers, f"{path}.layers")))
    try:
        return vector.at(chosen), VectorReference(name, digest, chosen)
    except SteeringError as error:
        raise SteeringError(f"{path}.layers", error.message) from None


def _decode_phase(
    entries: Any, path: str, vectors: list[tuple[SteeringVector, VectorReference | None]]
) -> PhaseProgram:
    terms = []
    for i, entry in enumerate(_list(entries, path)):
        pair = _list(entry, f"{path}[{i}]")
        if len(pair) != 2:
            raise SteeringError(f"{path}[{i}]", f"has {len(pair)} items, want [vector index, scale]")
        index, scale = pair
        if type(index) is not int or not 0 <= index < len(vectors):
            raise SteeringError(
                f"{path}[{i}][0]", f"got {shown(index)}, want the index of one of {len(vectors)} vectors"
            )
        if type(scale) not in (float, int) or not abs(scale) <= LARGEST_FLOAT32:
            raise SteeringError(f"{path}[{i}][1]", f"got {shown(scale)}, want a finite number")
        vector, reference = vectors[index]
        terms.append(Term(vector, float(scale), reference))
    return checked(PhaseProgram.of(terms), path)


def _keys(entry: Any, path: str, wanted: set[str]) -> None:
    if not isinstance(entry, Mapping):
        raise SteeringError(path, f"got {type(entry).__name__}, want an object with {', '.join(sorted(wanted))}")
    if set(entry) != wanted:
        raise SteeringError(path, f"has the keys {sorted(map(str, entry))}, want {sorted(wanted)}")


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise SteeringError(path, f"got {type(value).__name__}, want a list")
    return list(value)


def _layer(value: Any, path: str) -> int:
    if type(value) is not int or value < 0:
        raise SteeringError(path, f"got {shown(value)}, want a layer, a whole number from 0")
    return value


def _site(value: Any, path: str) -> Site:
    pair = _list(value, path)
    if len(pair) != 2 or pair[1] not in HookPoint.__members__.values():
        raise SteeringError(path, f"got {shown(value)}, want [layer, hook]")
    return Site(_layer(pair[0], f"{path}[0]"), HookPoint(pair[1]))
