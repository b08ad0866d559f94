"""The front end's registries of vectors and probes: what a name stands for at the moment a request is admitted.

Start-up content comes from files that every worker loads too. What is registered at run time lives with the front end
alone; requests that name one carry its content. A name is looked up once, at admission, and what travels on is a digest
or the content itself: a name registered anew can never change a request that is running.

Several API server processes share one registry through a directory: an index that is replaced atomically under a lock,
and one file per content, named by its digest.
"""

import atexit
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from trimtab.errors import SteeringError
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

MAX_REGISTERED = 1024  # names registered at run time: a bound on what a client can make the front end keep

DIRECTORY_VARIABLE = "TRIMTAB_REGISTRY_DIR"

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")  # goes into URLs and metrics unquoted


class Named(Protocol):
    """What a registry holds: content that is known by its digest and kept in files."""

    @property
    def digest(self) -> bytes: ...
    def save(self, path: str | Path) -> None: ...


Content = TypeVar("Content", bound=Named)


@dataclass(frozen=True)
class Entry(Generic[Content]):
    """One registered name: its content, and whether the workers hold that content from start."""

    name: str
    content: Content
    at_start: bool


class _Registry(Generic[Content]):
    """Names to contents, for one or several front-end processes.

    `start` is what workers have loaded. `directory`, if given, is shared: every process that opens it sees the same
    names. Without it the registry lives in this process.
    """

    kind: ClassVar[type[SteeringVector] | type[Probe]]

    def __init__(self, start: Mapping[str, Content], directory: Path | None = None) -> None:
        for name in start:
            check_name(name, "name")
        self._start = dict(start)
        self._start_digests = frozenset(content.digest for content in start.values())
        self._lock = RLock()
        self._changes: dict[str, Content | None] = {}  # since start; None: the name was deleted
        self._vectors: Mapping[str, Content] = dict(start)
        self._store = None if directory is None else _SharedStore[Content](directory, self.kind.load)
        self._stamp: object = None

    def vectors(self) -> Mapping[str, Content]:
        """Every name and its content now. The mapping is never changed afterwards: a change makes a new one."""
        if self._store is not None and self._store.stamp() != self._stamp:
            self._reload()
        return self._vectors

    def entries(self) -> list[Entry[Content]]:
        """All entries, by name."""
        vectors = self.vectors()
        return [Entry(name, vectors[name], self.held_by_workers(vectors[name].digest)) for name in sorted(vectors)]

    def held_by_workers(self, digest: bytes) -> bool:
        """Whether workers hold this content from start, so that a request may refer to it by digest."""
        return digest in self._start_digests

    def add(self, name: str, content: Content) -> Content | None:
        """Let `name` stand for `content` from now on; returns what it stood for, None if it is new.

        Raises `SteeringError` for a malformed name or a full registry.
        """
        check_name(name, "name")
        with self._changing():
            previous = self._vectors.get(name)
            registered = {known for known, content in self._changes.items() if content is not None}
            if len(registered | {name}) > MAX_REGISTERED:
                raise SteeringError("name", f"{MAX_REGISTERED} names are registered already; delete some first")
            self._changes[name] = content
        return previous

    def remove(self, name: str) -> Content:
        """Forget `name`; returns what it stood for. Requests already admitted are untouched. `KeyError` if unknown."""
        with self._changing():
            removed = self._vectors[name]
            if name in self._start:
                self._changes[name] = None
            else:
                del self._changes[name]
        return removed

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            if self._store is None:
                yield
            else:
                with self._store.exclusive():
                    self._reload()
                    try:
                        yield
                        self._store.write(self._changes)
                    finally:
                        self._reload()  # what is on disk counts, whether or not the write went through
                return
            self._apply()

    def _reload(self) -> None:
        assert self._store is not None
        with self._lock:
            self._stamp = self._store.stamp()  # taken before reading: a later write is seen as a change again
            known = {vector.digest: vector for vector in [*self._start.values(), *self._vectors.values()]}
            self._changes = self._store.read(known)
            self._apply()

    def _apply(self) -> None:
        merged: dict[str, Content] = {**self._start}
        for name, content in self._changes.items():
            if content is None:
                merged.pop(name, None)
            else:
                merged[name] = content
        self._vectors = merged


class VectorRegistry(_Registry[SteeringVector]):
    """Names of vectors."""

    kind = SteeringVector


class ProbeRegistry(_Registry[Probe]):
    """Names of probes."""

    kind = Probe


def check_name(name: object, field: str) -> str:
    """`name`, if it can be registered. Raises `SteeringError` at `field`."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise SteeringError(
            field,
            f"got {name!r:.160}; a name has 1 to 128 letters, digits, '.', '_', ':' or '-', a letter or digit first",
        )
    return name


def share_registry(processes: int) -> None:
    """Prepare a directory for the registry of `processes` front-end processes started by this one; none for one alone.

    It goes when this process ends. A directory named by the operator in the environment is used and kept.
    """
    if processes < 2 or os.environ.get(DIRECTORY_VARIABLE):
        return
    directory = tempfile.mkdtemp(prefix="trimtab-registry-")
    os.environ[DIRECTORY_VARIABLE] = directory  # what the processes inherit
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(directory, ignore_errors=True) if os.getpid() == owner else None)


def shared_directory() -> Path | None:
    """The directory prepared by `share_registry` in this process or the one that started it."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    return Path(directory) if directory else None


class _SharedStore(Generic[Content]):
    """The directory: `index.json` {name: digest or null}, `<digest>.safetensors`, and `lock`."""

    def __init__(self, directory: Path, load: Callable[[Path], Any]) -> None:
        self._load = load
        self._directory = directory
        self._index = directory / "index.json"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stamp(self) -> object:
        """Changes whenever the index is replaced; one `stat`, a few microseconds."""
        try:
            status = os.stat(self._index)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the directory against other processes."""
        with open(self._directory / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def read(self, known: Mapping[bytes, Content]) -> dict[str, Content | None]:
        """The changes since start, loading only content that is not in `known`."""
        for attempt in range(10):
            try:
                index = json.loads(self._index.read_text(encoding="utf-8"))
                return {name: None if hexed is None else self._vector(hexed, known) for name, hexed in index.items()}
            except FileNotFoundError:
                if not self._index.exists():
                    return {}
                if attempt == 9:  # content vanished between index and load ten times over: not a race any more
                    raise
        raise AssertionError("unreachable")

    def write(self, changes: Mapping[str, Content | None]) -> None:
        """Publish `changes`; content first, then the index in one step, then unused content goes."""
        index = {name: None if vector is None else vector.digest.hex() for name, vector in changes.items()}
        for vector in changes.values():
            if vector is not None and not (target := self._file(vector.digest.hex())).exists():
                partial = self._directory / f"partial-{secrets.token_hex(8)}.safetensors"
                vector.save(partial)
                os.replace(partial, target)
        partial = self._directory / f"partial-{secrets.token_hex(8)}.json"
        partial.write_text(json.dumps(index), encoding="utf-8")
        os.replace(partial, self._index)
        used = {self._file(hexed) for hexed in index.values() if hexed is not None}
        for file in self._directory.glob("*.safetensors"):
            if file not in used:
                with suppress(FileNotFoundError):
                    file.unlink()

    def _vector(self, hexed: str, known: Mapping[bytes, Content]) -> Content:
        if (held := known.get(bytes.fromhex(hexed))) is not None:
            return held
        file = self._file(hexed)
        try:
            vector: Content = self._load(file)
        except SteeringError:
            if not file.exists():  # deleted since the index was read
                raise FileNotFoundError(file) from None
            raise
        if vector.digest.hex() != hexed:
            raise SteeringError("vectors", f"the shared registry's {file.name} does not hold what its name says")
        return vector

    def _file(self, hexed: str) -> Path:
        return self._directory / f"{hexed}.safetensors"
