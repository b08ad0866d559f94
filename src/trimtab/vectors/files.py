"""Reading and writing vector files: which format a path is, and one kind of error for all that can be wrong with it.

Nothing here executes what it reads: no pickle, and tensors of other people's `.pt` files through `weights_only` alone.
"""

import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

MAX_FILE_BYTES = 256 << 20  # a vector with five hooks in 128 layers of width 16384 in float32 takes 42 MB


def load_vector(path: Path, hook: HookPoint | str | None = None) -> SteeringVector:
    """The vector in `path`, in any known format; `hook` says where layers of a `.svec` file act.

    Raises `SteeringError` naming the path for everything else, and for a `hook` beside a format that states its own.
    """
    with _one_error(path, "cannot be read as a steering vector"):
        _check_exists(path)
        return _reader(path, hook)(path)


def save_vector(vector: SteeringVector, path: Path) -> None:
    """Write in the format that the suffix names. Raises `SteeringError` for a suffix other than these two."""
    with _one_error(path, "cannot be written"):
        if path.suffix not in (".safetensors", ".gguf"):
            raise SteeringError("", "vectors are written as .safetensors (the native format) or .gguf")
        with _replaced(path) as file:
            if path.suffix == ".gguf":
                from trimtab.vectors.formats.gguf import write_gguf

                write_gguf(vector, file)
            else:
                from trimtab.vectors.formats.native import write_vector

                write_vector(vector, file)


def load_probe(path: Path) -> Probe:
    """The probe in a native file. Raises `SteeringError` naming the path for everything else."""
    from trimtab.vectors.formats.native import read_probe

    with _one_error(path, "cannot be read as a probe"):
        _check_exists(path)
        if path.suffix != ".safetensors":
            raise SteeringError("", "probes are read from .safetensors files")
        return read_probe(path)


def load_vector_or_probe(path: Path, hook: HookPoint | str | None = None) -> SteeringVector | Probe:
    """What a file holds, vector or probe, in any known format. Raises `SteeringError` as `load_vector` does."""
    with _one_error(path, "cannot be read as a steering vector or a probe"):
        _check_exists(path)
        if hook is None and path.suffix == ".safetensors" and not path.is_dir():  # the one format that both have
            from trimtab.vectors.formats.native import read_either

            return read_either(path)
        return _reader(path, hook)(path)


def save_probe(probe: Probe, path: Path) -> None:
    """Write the native format. Raises `SteeringError` for another suffix, and where the file cannot be written."""
    from trimtab.vectors.formats.native import write_probe

    with _one_error(path, "cannot be written"):
        if path.suffix != ".safetensors":
            raise SteeringError("", "probes are written as .safetensors files")
        with _replaced(path) as file:
            write_probe(probe, file)


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


def _reader(path: Path, hook: HookPoint | str | None = None) -> Callable[[Path], SteeringVector]:
    if path.suffix == ".svec" and not path.is_dir():
        from trimtab.vectors.formats.foreign import read_svec

        if hook is not None and hook not in set(HookPoint):
            raise SteeringError("hook", f"got {hook!r:.80}; want one of {', '.join(HookPoint)}")
        return partial(read_svec, hook=None if hook is None else HookPoint(hook))
    if hook is not None:
        raise SteeringError("hook", "can be given for .svec files alone: this format says where its layers act")
    if path.is_dir():
        from trimtab.vectors.formats.foreign import read_easyedit_folder

        return read_easyedit_folder
    if path.suffix == ".safetensors":
        from trimtab.vectors.formats.native import read_vector

        return read_vector
    if path.suffix == ".gguf":
        from trimtab.vectors.formats.gguf import read_gguf

        return read_gguf
    raise SteeringError("", "the suffix is unknown: want .safetensors, .gguf, .svec, or a folder of layer_N.pt files")


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
