"""How vectors travel between processes: see `trimtab.program.codec`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import VectorReference
from trimtab.program.wire_values import check_keys, hook_of, layer_of, list_of, parts_of, site_of, truth_of
from trimtab.vectors.inline import MAX_LAYERS
from trimtab.vectors.values import FloatArray, owners
from trimtab.vectors.vector import Part, SteeringVector
from trimtab.wording import shown

WIDTHS_BELOW = 1 << 31

Known = tuple[SteeringVector, VectorReference | None]


def encode_vector(vector: SteeringVector, reference: VectorReference | None, views: bool) -> dict[str, Any]:
    """The form of a vector: its name where it has a `reference`, else its content."""
    if reference is not None:
        layers = None if reference.layers is None else list(reference.layers)
        named: dict[str, Any] = {"name": reference.name, "digest": reference.digest, "layers": layers}
        if reference.hooks is not None:
            named["hooks"] = [hook.value for hook in reference.hooks]
        if (part := reference.part) is not None:
            named["part"] = [part.site.layer, part.site.hook.value, part.before]
        return named
    sites = [[site.layer, site.hook.value] for site in vector.sites]
    block = vector.block[:1] if vector.is_spread else vector.block
    data = block.astype("<f4", copy=False).data.cast("B")
    views = views and _sealed(block)  # what is sent must be what was named by its digest
    content = {"sites": sites, "width": vector.hidden_size, "data": data if views else bytes(data)}
    return content | {"spread": True} if vector.is_spread else content


def _sealed(block: FloatArray) -> bool:
    """Whether all arrays that `block` is a view of are read-only too, so that no one can write to its numbers."""
    bases = owners(block)[1:]
    return bool(bases) and not any(base.flags.writeable for base in bases)


def decode_vector(entry: Any, path: str, vectors_by_digest: Mapping[bytes, SteeringVector]) -> Known:
    """The vector of a form, and the reference by which it came. Raises `SteeringError`."""
    if isinstance(entry, Mapping) and "name" in entry:
        return _decode_reference(entry, path, vectors_by_digest)
    spread = isinstance(entry, Mapping) and "spread" in entry
    check_keys(entry, path, {"sites", "width", "data", "spread"} if spread else {"sites", "width", "data"})
    spread = spread and truth_of(entry["spread"], f"{path}.spread")
    sites = [site_of(site, f"{path}.sites[{i}]") for i, site in enumerate(list_of(entry["sites"], f"{path}.sites"))]
    width, data = entry["width"], entry["data"]
    if type(width) is not int or not 0 < width < WIDTHS_BELOW:
        raise SteeringError(f"{path}.width", f"got {shown(width)}, want a whole number above 0")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise SteeringError(f"{path}.data", f"got {type(data).__name__}, want bytes")
    size, rows = memoryview(data).nbytes, 1 if spread else len(sites)
    if not sites or size != 4 * width * rows:
        raise SteeringError(f"{path}.data", f"has {size} bytes, want {4 * width * rows} for its sites and width")
    block = np.frombuffer(bytes(data), dtype="<f4").reshape(rows, width)
    vector = SteeringVector.from_block(sites[:rows], block, field=path)
    if not spread:
        return vector, None
    if len(set(sites)) != len(sites):
        raise SteeringError(path, "one site is given twice")
    return vector.spread(sites), None


def _decode_reference(
    entry: Mapping[str, Any], path: str, vectors_by_digest: Mapping[bytes, SteeringVector]
) -> tuple[SteeringVector, VectorReference]:
    check_keys(entry, path, {"name", "digest", "layers"} | ({"hooks", "part"} & set(entry)))
    name, digest, layers = entry["name"], entry["digest"], entry["layers"]
    if not isinstance(name, str):
        raise SteeringError(f"{path}.name", f"got {type(name).__name__}, want a string")
    if not isinstance(digest, bytes) or (vector := vectors_by_digest.get(digest)) is None:
        said = digest.hex()[:16] if isinstance(digest, bytes) else type(digest).__name__
        raise SteeringError(f"{path}.digest", f"vector {name!r:.80} ({said}) is not registered in this process")
    chosen = None
    if layers is not None:
        chosen = tuple(layer_of(one, f"{path}.layers[{i}]") for i, one in enumerate(_some(layers, f"{path}.layers")))
    hooks = None
    if "hooks" in entry:
        given = _some(entry["hooks"], f"{path}.hooks")
        hooks = tuple(hook_of(hook, f"{path}.hooks[{i}]") for i, hook in enumerate(given))
    try:
        vector = vector.acting(chosen, hooks)
    except SteeringError as error:
        raise SteeringError(f"{path}.{error.field}", error.message) from None
    if "part" not in entry:
        return vector, VectorReference(name, digest, chosen, hooks=hooks)
    part = _part(entry["part"], f"{path}.part")
    if (kept := vector.part(part)) is None:
        side = "before it" if part.before else "from it on"
        raise SteeringError(f"{path}.part", f"vector {name!r:.80} has no site {side}: {part.site}")
    return kept, VectorReference(name, digest, chosen, part, hooks)


def _some(value: Any, path: str) -> list[Any]:
    """A list of layers or hook points that a request could have: a few bytes must not become millions of sites."""
    some = list_of(value, path)
    if not 0 < len(some) <= MAX_LAYERS:
        raise SteeringError(path, f"has {len(some)} items, want 1 to {MAX_LAYERS}")
    return some


def _part(value: Any, path: str) -> Part:
    parts = parts_of(value, path, "layer", "hook", "whether before")
    return Part(site_of(parts[:2], path), truth_of(parts[2], path))
