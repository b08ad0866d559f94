"""Reading and writing vector files: which format a path is, and the native one (safetensors). See docs/formats.md.

Nothing here executes what it reads: no pickle, and tensors of other people's `.pt` files through `weights_only` alone.
"""

from collections.abc import Callable
from pathlib import Path

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector, VectorMetadata

FORMAT = "trimtab-steering-vector"
VERSION = "1"
MAX_FILE_BYTES = 256 << 20  # a vector with five hooks in 128 layers of width 16384 in float32 takes 42 MB

_EXTRA = "extra."  # prefix of free metadata, so that it can never shadow a key of the format


def load_vector(path: Path) -> SteeringVector:
    """The vector in `path`, in any known format. Raises `SteeringError` naming the path for everything else."""
    reader = _reader(path)
    try:
        return reader(path)
    except SteeringError as error:
        raise SteeringError(str(path), f"{error.field}: {error.message}" if error.field else error.message) from error
    except Exception as error:  # parsers of hostile bytes raise anything: a caller handles one kind of failure
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SteeringError(str(path), f"cannot be read as a steering vector ({reason:.200})") from error


def save_vector(vector: SteeringVector, path: Path) -> None:
    """Write in the format that the suffix names. Raises `SteeringError` for a suffix other than these two."""
    if path.suffix not in (".safetensors", ".gguf"):
        raise SteeringError(str(path), "vectors are written as .safetensors (the native format) or .gguf")
    try:
        if path.suffix == ".gguf":
            from trimtab.vectors.gguf import write_gguf

            write_gguf(vector, path)
        else:
            write_safetensors(vector, path)
    except SteeringError as error:
        raise SteeringError(str(path), error.message) from error
    except Exception as error:  # each library has its own error for a folder that is not there or a disk that is full
        raise SteeringError(str(path), f"cannot be written ({error})") from error


def _reader(path: Path) -> Callable[[Path], SteeringVector]:
    if not path.exists():
        raise SteeringError(str(path), "there is no such file")
    if path.is_dir():
        from trimtab.vectors.foreign import read_easyedit_folder

        return read_easyedit_folder
    if path.stat().st_size > MAX_FILE_BYTES:
        raise SteeringError(str(path), f"is larger than {MAX_FILE_BYTES} bytes, too large for a steering vector")
    if path.suffix == ".safetensors":
        return read_safetensors
    if path.suffix == ".gguf":
        from trimtab.vectors.gguf import read_gguf

        return read_gguf
    if path.suffix == ".svec":
        from trimtab.vectors.foreign import read_svec

        return read_svec
    raise SteeringError(
        str(path), "the suffix is unknown: want .safetensors, .gguf, .svec, or a folder of layer_N.pt files"
    )


def write_safetensors(vector: SteeringVector, path: Path) -> None:
    """The native format: one float32 tensor [hidden_size] named `HOOK.LAYER` per site, and string metadata."""
    from safetensors.numpy import save_file

    about = vector.metadata
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "hidden_size": str(vector.hidden_size),
        "base_model": about.base_model,
        "method": about.method,
        "source": about.source,
    }
    metadata.update({_EXTRA + key: value for key, value in about.extra.items()})
    tensors = {f"{site.hook.value}.{site.layer}": row for site, row in vector.directions.items()}
    save_file(tensors, path, metadata=metadata)


def read_safetensors(path: Path) -> SteeringVector:
    """The native format. Tensors of float16, float32 or float64 are read; anything unexpected is refused."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise SteeringError("metadata.format", f"is {metadata.get('format')!r}, want {FORMAT!r}")
        if metadata.get("version") != VERSION:
            raise SteeringError("metadata.version", f"is {metadata.get('version')!r}, this release reads {VERSION!r}")
        directions = {site_of_key(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    extra = {key.removeprefix(_EXTRA): value for key, value in metadata.items() if key.startswith(_EXTRA)}
    about = {key: metadata.get(key, "") for key in ("base_model", "method", "source")}
    vector = SteeringVector(directions, VectorMetadata(**about, extra=extra))
    if metadata.get("hidden_size") != str(vector.hidden_size):
        said = metadata.get("hidden_size")
        raise SteeringError("metadata.hidden_size", f"says {said!r}, but the tensors have {vector.hidden_size} numbers")
    return vector


def site_of_key(key: str) -> Site:
    """The site that a tensor name such as `post_block.14` stands for. Raises `SteeringError` for any other name."""
    hook, _, layer = key.partition(".")
    if hook not in HookPoint.__members__.values() or not (layer.isascii() and layer.isdecimal()):
        hooks = ", ".join(point.value for point in HookPoint)
        raise SteeringError(f"tensor {key!r:.80}", f"is not named HOOK.LAYER, HOOK being one of {hooks}")
    if str(int(layer)) != layer:
        raise SteeringError(f"tensor {key!r:.80}", f"the layer is written {int(layer)}, without leading zeros")
    return Site(int(layer), HookPoint(hook))
