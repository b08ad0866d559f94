"""A directory of named contents that several front ends share: an index, one file per content, and a lock.

`index.json` holds {name: digest} and is replaced in one step; `<digest>.safetensors` holds a content. Whatever becomes
of the directory is an error that says what is wrong with it; nothing in it is deleted that its index did not name.
"""

import fcntl
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from trimtab.errors import SteeringError
from trimtab.json_text import read_json

DIRECTORY_VARIABLE = "TRIMTAB_REGISTRY_DIR"

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")  # goes into URLs and metrics unquoted

LOCK_SECONDS = 10.0  # how long a change waits for one of another process

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"partial-[0-9a-f]{16}\.(json|safetensors)")
_LARGEST_INDEX = 4 << 20  # bytes: 20 times what the most names take


class RegistryUnavailableError(SteeringError):
    """The directory cannot be read or changed at present; the message says why, and what helps."""


class Named(Protocol):
    """What a registry holds: content that is known by its digest and kept in files."""

    @property
    def digest(self) -> bytes: ...
    def save(self, path: str | Path) -> None: ...


Content = TypeVar("Content", bound=Named)


@dataclass(frozen=True)
class Stored(Generic[Content]):
    """What the index says of one name: a digest, and its content, or why that cannot be read."""

    digest: str
    content: Content | None
    fault: str = ""


@dataclass(frozen=True)
class Index(Generic[Content]):
    """What a directory holds. `foreign` is what is in its index and not understood: it is written back as it is."""

    entries: Mapping[str, Stored[Content]] = field(default_factory=dict)
    foreign: Mapping[str, Any] = field(default_factory=dict)


class SharedStore(Generic[Content]):
    """The directory. Each method raises `RegistryUnavailableError` where it cannot do what it says."""

    def __init__(self, directory: Path, load: Callable[[Path], Any]) -> None:
        self.directory = directory
        self._load = load
        self._index = directory / "index.json"
        with suppress(OSError):  # found out, and said, when it is read
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stamp(self) -> object:
        """Changes whenever the index is replaced; None where there is none. One `stat`, a few microseconds."""
        try:
            status = os.stat(self._index)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unavailable(f"index.json cannot be read ({_reason(error)})") from error
        return status.st_ino, status.st_mtime_ns, status.st_size

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the directory against other processes. The lock of one that has died is free."""
        lock = self._lock()
        try:
            yield
        finally:
            os.close(lock)

    def _lock(self) -> int:
        path = self.directory / "lock"
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(lock).st_ino == os.stat(path).st_ino:  # else it was replaced while we opened it
                        return lock
                except BaseException:
                    os.close(lock)
                    raise
                os.close(lock)
            except BlockingIOError:
                pass
            except FileNotFoundError as error:
                raise self.gone() from error
            except OSError as error:
                raise _unavailable(f"its lock cannot be taken ({_reason(error)})") from error
            if time.monotonic() > deadline:
                raise _unavailable(f"another process has held its lock for more than {LOCK_SECONDS:g} seconds")
            time.sleep(0.01)

    def read(self, known: Mapping[str, Content]) -> Index[Content]:
        """What the directory holds, loading only content whose digest is not in `known`."""
        for _ in range(10):
            stamp = self.stamp()
            if stamp is None:
                return Index()
            index = self._read_index()
            entries = {name: self._stored(digest, known) for name, digest in index.items() if _is_entry(name, digest)}
            if all(stored.content is not None for stored in entries.values()) or stamp == self.stamp():
                break  # else content went between index and load, with a change
        kept = {name: value for name, value in index.items() if not _is_entry(name, value) and value is not None}
        return Index(entries, kept)

    def write(self, index: Index[Content], before: Index[Content]) -> None:
        """Publish `index`: content first, then the index in one step; then what only `before` used goes."""
        try:
            for name, stored in index.entries.items():
                target = self._file(stored.digest)
                new = before.entries.get(name) is not stored  # written whatever is there: it may be damaged
                if stored.content is not None and (new or not target.exists()):
                    partial = self._partial("safetensors")
                    stored.content.save(partial)
                    _sync(partial)
                    os.replace(partial, target)
            partial = self._partial("json")
            names = {name: stored.digest for name, stored in index.entries.items()}
            partial.write_text(json.dumps({**index.foreign, **names}), encoding="utf-8")
            _sync(partial)
            self._date_after_the_last(partial)
            os.replace(partial, self._index)
        except (OSError, SteeringError) as error:
            raise _unavailable(f"it cannot be written to ({_reason(error)})") from error
        finally:
            self._tidy(_digests(before) | _digests(index))

    def gone(self) -> RegistryUnavailableError:
        """The error where there was an index and is none any more."""
        what = "index.json is gone from it; restore it" if self.directory.is_dir() else "it is gone; make it anew"
        return _unavailable(f"{what}: what a running server knows is written again with its next change")

    def _read_index(self) -> Mapping[str, Any]:
        try:
            status = os.stat(self._index)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_INDEX:
                raise _damaged("is no file of names")
            index = read_json(self._index.read_bytes())
        except OSError as error:
            raise _unavailable(f"index.json cannot be read ({_reason(error)})") from error
        except RegistryUnavailableError:
            raise
        except SteeringError as error:
            raise _damaged(error.message) from error
        if not isinstance(index, dict):
            raise _damaged(f"holds a {type(index).__name__}, not an object of names")
        return index

    def _stored(self, digest: str, known: Mapping[str, Content]) -> Stored[Content]:
        if (held := known.get(digest)) is not None:
            return Stored(digest, held)
        file = self._file(digest)
        try:
            if not stat.S_ISREG(os.stat(file).st_mode):
                return Stored(digest, None, f"{file.name} is no file")
            content: Content = self._load(file)
        except (OSError, SteeringError) as error:
            return Stored(digest, None, f"{file.name} cannot be read ({_reason(error)})")
        if content.digest.hex() != digest:
            return Stored(digest, None, f"{file.name} does not hold what its name says")
        return Stored(digest, content)

    def _date_after_the_last(self, partial: Path) -> None:
        # Whatever the clock does, and whatever number the file system gives: no two indexes have the same stamp.
        with suppress(OSError):
            after = max(time.time_ns(), os.stat(self._index).st_mtime_ns + 1)
            os.utime(partial, ns=(after, after))

    def _tidy(self, digests: set[str]) -> None:
        """Delete what the index of this directory does not name any more, and nothing that it never named."""
        with suppress(OSError, SteeringError):
            for name in os.listdir(self.directory):
                if _PARTIAL.fullmatch(name):  # of a change that came to nothing: we hold the lock
                    (self.directory / name).unlink(missing_ok=True)
            used = {value for value in self._read_index().values() if isinstance(value, str)}
            for digest in digests - used:
                self._file(digest).unlink(missing_ok=True)

    def _partial(self, suffix: str) -> Path:
        return self.directory / f"partial-{secrets.token_hex(8)}.{suffix}"

    def _file(self, digest: str) -> Path:
        return self.directory / f"{digest}.safetensors"


def _is_entry(name: str, digest: Any) -> bool:
    return bool(NAME_PATTERN.fullmatch(name)) and isinstance(digest, str) and bool(_DIGEST.fullmatch(digest))


def _digests(index: Index[Any]) -> set[str]:
    return {stored.digest for stored in index.entries.values()}


def _sync(path: Path) -> None:
    """Let the content of a file reach the disk before its name does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, SteeringError):
        return error.message
    return str(getattr(error, "strerror", None) or error)


def _unavailable(reason: str) -> RegistryUnavailableError:
    return RegistryUnavailableError("", f"the registry directory ({DIRECTORY_VARIABLE}) is not usable: {reason}")


def _damaged(reason: str) -> RegistryUnavailableError:
    remedy = "restore it, or remove it: names known to a running server are written anew with its next change"
    return _unavailable(f"index.json {reason}; {remedy}")
