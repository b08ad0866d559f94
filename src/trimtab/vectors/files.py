"""Reading and writing vector files: which format a path is, and one kind of error for all that can be wrong with it.

Nothing here executes what it reads: no pickle, and tensors of other people's `.pt` files through `weights_only` alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import SteeringError
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

MAX_FILE_BYTES = 256 << 20  # a vector with five hooks in 128 layers of width 16384 in float32 takes 42 MB


def load_vector(path: Path) -> SteeringVector:
    """The vector in `path`, in any known format. Raises `SteeringError` naming the path for everything else."""
    with _one_error(path, "cannot be read as a steering vector"):
        _check_exists(path)
        return _reader(path)(path)


def save_vector(vector: SteeringVector, path: Path) -> None:
    """Write in the format that the suffix names. Raises `SteeringError` for a suffix other than these two."""
    with _one_error(path, "cannot be written"):
        if path.suffix == ".gguf":
            from trimtab.vectors.gguf import write_gguf

            write_gguf(vector, path)
        elif path.suffix == ".safetensors":
            from trimtab.vectors.native import write_vector

            write_vector(vector, path)
        else:
            raise SteeringError("", "vectors are written as .safetensors (the native format) or .gguf")


def load_probe(path: Path) -> Probe:
    """The probe in a native file. Raises `SteeringError` naming the path for everything else."""
    from trimtab.vectors.native import read_probe

    with _one_error(path, "cannot be read as a probe"):
        _check_exists(path)
        if path.suffix != ".safetensors":
            raise SteeringError("", "probes are read from .safetensors files")
        return read_probe(path)


def load_vector_or_probe(path: Path) -> SteeringVector | Probe:
    """What a file holds, vector or probe, in any known format. Raises `SteeringError` naming the path otherwise."""
    with _one_error(path, "cannot be read as a steering vector or a probe"):
        _check_exists(path)
        if path.suffix == ".safetensors" and not path.is_dir():  # the one format that both have
            from trimtab.vectors.native import read_either

            return read_either(path)
        return _reader(path)(path)


def save_probe(probe: Probe, path: Path) -> None:
    """Write the native format. Raises `SteeringError` for another suffix, and where the file cannot be written."""
    from trimtab.vectors.native import write_probe

    with _one_error(path, "cannot be written"):
        if path.suffix != ".safetensors":
            raise SteeringError("", "probes are written as .safetensors files")
        write_probe(probe, path)


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise SteeringError("", "there is no such file")
    if not path.is_dir() and path.stat().st_size > MAX_FILE_BYTES:
        raise SteeringError("", f"is larger than {MAX_FILE_BYTES} bytes, too large for a steering vector")


def _reader(path: Path) -> Callable[[Path], SteeringVector]:
    if path.is_dir():
        from trimtab.vectors.foreign import read_easyedit_folder

        return read_easyedit_folder
    if path.suffix == ".safetensors":
        from trimtab.vectors.native import read_vector

        return read_vector
    if path.suffix == ".gguf":
        from trimtab.vectors.gguf import read_gguf

        return read_gguf
    if path.suffix == ".svec":
        from trimtab.vectors.foreign import read_svec

        return read_svec
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
