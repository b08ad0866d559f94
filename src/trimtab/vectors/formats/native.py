"""The native file format: safetensors with one float32 tensor per site and string metadata. See docs/formats.md."""

from pathlib import Path
from typing import Any

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import Content, VectorMetadata, Writable

VECTOR_FORMAT = "trimtab-steering-vector"
PROBE_FORMAT = "trimtab-probe"
VERSION = "1"

_EXTRA = "extra."  # prefix of free metadata, so that it can never shadow a key of the format


def write_vector(vector: Writable, path: Path) -> None:
    """One float32 tensor [hidden_size] named `HOOK.LAYER` per site."""
    _write(vector, path, VECTOR_FORMAT, {})


def write_probe(vector: Writable, bias: float, path: Path) -> None:
    """As a vector of one site, with the bias in the metadata."""
    _write(vector, path, PROBE_FORMAT, {"bias": repr(bias)})


def read_vector(path: Path) -> Content:
    """The vector in a file; floats of other widths are rounded to float32. Raises `SteeringError` for other content."""
    return _read(path, VECTOR_FORMAT)


def read_probe(path: Path) -> Content:
    """The probe in a file. Raises `SteeringError` for other content."""
    return _read(path, PROBE_FORMAT)


def read_either(path: Path) -> Content:
    """The vector or the probe in a file, whichever it says it is. Raises `SteeringError` for other content."""
    return _read(path, VECTOR_FORMAT, PROBE_FORMAT)


def site_of_key(key: str) -> Site:
    """The site that a tensor name such as `post_block.14` stands for. Raises `SteeringError` for any other name."""
    hook, _, layer = key.partition(".")
    if hook not in HookPoint.__members__.values() or not (layer.isascii() and layer.isdecimal() and len(layer) < 10):
        hooks = ", ".join(point.value for point in HookPoint)
        raise SteeringError(f"tensor {key!r:.80}", f"is not named HOOK.LAYER, HOOK being one of {hooks}")
    if str(int(layer)) != layer:
        raise SteeringError(f"tensor {key!r:.80}", f"the layer is written {int(layer)}, without leading zeros")
    return Site(int(layer), HookPoint(hook))


def _write(vector: Writable, path: Path, kind: str, more: dict[str, str]) -> None:
    from safetensors.numpy import save_file

    about = vector.metadata
    metadata = {
        "format": kind,
        "version": VERSION,
        "hidden_size": str(vector.hidden_size),
        "base_model": about.base_model,
        "method": about.method,
        "source": about.source,
    }
    metadata |= more | {_EXTRA + key: value for key, value in about.extra.items()}
    save_file({f"{site.hook.value}.{site.layer}": row for site, row in vector.directions.items()}, path, metadata)


def _read(path: Path, *kinds: str) -> Content:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") not in kinds:
            wanted = " or ".join(map(repr, kinds))
            raise SteeringError("metadata.format", f"is {metadata.get('format')!r:.80}, want {wanted}")
        if metadata.get("version") != VERSION:
            said = f"{metadata.get('version')!r:.80}"
            raise SteeringError("metadata.version", f"is {said}, this release reads {VERSION!r}")
        directions = {site_of_key(key): _tensor(file, key, path) for key in file.keys()}  # noqa: SIM118 (not a dict)
    extra = {key.removeprefix(_EXTRA): value for key, value in metadata.items() if key.startswith(_EXTRA)}
    about = {key: metadata.get(key, "") for key in ("base_model", "method", "source")}
    widths = {int(row.shape[-1]) for row in directions.values() if row.ndim == 1}
    if len(widths) == 1 and metadata.get("hidden_size") != str(width := widths.pop()):
        said = f"{metadata.get('hidden_size')!r:.80}"
        raise SteeringError("metadata.hidden_size", f"says {said}, but the tensors have {width} numbers")
    bias = _bias(metadata) if metadata["format"] == PROBE_FORMAT else None
    return Content(directions, VectorMetadata(**about, extra=extra), bias)


def _bias(metadata: dict[str, str]) -> float:
    try:
        return float(metadata["bias"])
    except (KeyError, ValueError):
        raise SteeringError("metadata.bias", f"is {metadata.get('bias')!r:.80}, want a number") from None


def _tensor(file: Any, key: str, path: Path) -> Any:
    """The tensor `key` of an open file. Raises `SteeringError` where it holds no plain floats."""
    dtype = file.get_slice(key).get_dtype()
    if dtype not in ("F16", "BF16", "F32", "F64"):
        raise SteeringError(f"tensor {key!r:.80}", f"is stored as {dtype}, want a float type")
    if dtype != "BF16":
        return file.get_tensor(key)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as with_torch:  # NumPy has no bfloat16
        return with_torch.get_tensor(key)
