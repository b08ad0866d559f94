"""Reading and writing vector files: which format a path is, and one kind of error for all that can be wrong with it.

Nothing here executes what it reads: no pickle, and tensors of other people's `.pt` files through `weights_only` alone.
Libraries of formats are imported where a file needs them.
"""

import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint
from trimtab.vectors.content import Content, Writable
from trimtab.vectors.formats import easyedit, gguf, native, svec

MAX_FILE_BYTES = 256 << 20  # a vector with six hooks in 128 layers of width 16384 in float32 takes 50 MB


def read_file(path: Path, *, hook: HookPoint | str | None = None, probes_too: bool = False) -> Content:
    """What `path` holds, in any known format; `hook` says where layers of a `.svec` file act.

    To be called within `reading`. Raises `SteeringError`, and whatever a parser of hostile bytes raises.
    """
    _check_exists(path)
    if path.suffix == ".svec" and not path.is_dir():
        if hook is not None and hook not in set(HookPoint):
            raise SteeringError("hook", f"got {hook!r:.80}; want one of {', '.join(HookPoint)}")
        return svec.read_svec(path, None if hook is None else HookPoint(hook))
    if hook is not None:
        raise SteeringError("hook", "can be given for .svec files alone: this format says where its layers act")
    if path.is_dir():
        return easyedit.read_easyedit_folder(path)
    if path.suffix == ".safetensors":  # the one format that probes have too
        return native.read_either(path) if probes_too else native.read_vector(path)
    if path.suffix == ".gguf":
        return gguf.read_gguf(path)
    raise SteeringError("", "the suffix is unknown: want .safetensors, .gguf, .svec, or a folder of layer_N.pt files")


def read_probe(path: Path) -> Content:
    """The probe in a native file. To be called within `reading`, as `read_file`."""
    _check_exists(path)
    if path.suffix != ".safetensors":
        raise SteeringError("", "probes are read from .safetensors files")
    return native.read_probe(path)


def write_vector(vector: Writable, path: Path) -> None:
    """Write in the format that the suffix names. Raises `SteeringError` for a suffix other than these two."""
    with _one_error(path, "cannot be written"):
        if path.suffix not in (".safetensors", ".gguf"):
            raise SteeringError("", "vectors are written as .safetensors (the native format) or .gguf")
        with _replaced(path) as file:
            (gguf.write_gguf if path.suffix == ".gguf" else native.write_vector)(vector, file)


def write_probe(vector: Writable, bias: float, path: Path) -> None:
    """Write the native format. Raises `SteeringError` for another suffix, and where the file cannot be written."""
    with _one_error(path, "cannot be written"):
        if path.suffix != ".safetensors":
            raise SteeringError("", "probes are written as .safetensors files")
        with _replaced(path) as file:
            native.write_probe(vector, bias, file)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever is wrong with `path` or its content becomes one `SteeringError` that names it and `what` was wanted."""
    with _one_error(path, f"cannot be read as {what}"):
        yield


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once it is whole, with the rights that new files have here.

    Libraries that write through a temporary file of their own leave it readable by its owner alone.
    """
    path = path.resolve()  # a link keeps pointing to what it points to
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        file = Path(folder) / path.name
        file.touch()
        mode = path.stat().st_mode if path.exists() else file.stat().st_mode
        yield file
        file.chmod(stat.S_IMODE(mode))
        file.replace(path)


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise SteeringError("", "there is no such file")
    if not path.is_dir() and path.stat().st_size > MAX_FILE_BYTES:
        raise SteeringError("", f"is larger than {MAX_FILE_BYTES} bytes, too large for a steering vector")


@contextmanager
def _one_error(path: Path, what: str) -> Iterator[None]:
    """Whatever a library raises about this path becomes a `SteeringError` of one line that names it."""
    try:
        yield
    except SteeringError as error:
        raise SteeringError(str(path), f"{error.field}: {error.message}" if error.field else error.message) from error
    except Exception as error:  # parsers of hostile bytes raise anything: a caller handles one kind of failure
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SteeringError(str(path), f"{what} ({reason:.200})") from error
