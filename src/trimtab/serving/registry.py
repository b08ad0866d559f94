"""The front end's registries of vectors and probes: what a name stands for at the moment a request is admitted.

Start-up content comes from files that every worker loads too. Its names are the operator's: nobody changes what they
stand for while the server runs. What is registered at run time lives with the front end alone; requests that name it
carry its content. A name is looked up once, at admission, and what travels on is a digest or the content itself: a name
registered anew can never change a request that is running.

Several API server processes share one registry through a directory (`registry_store`). Where that is lost or damaged,
the names known so far go on, start-up names among them, and changes are refused with the reason.
"""

import atexit
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic

from trimtab.errors import SteeringError
from trimtab.serving.registry_store import (
    DIRECTORY_VARIABLE,
    LOCK_SECONDS,
    NAME_PATTERN,
    Content,
    Index,
    RegistryUnavailableError,
    SharedStore,
    Stored,
)
from trimtab.vectors.dose import without_stream_norms
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

MAX_REGISTERED = 1024  # names registered at run time: a bound on what a client can make the front end keep

RETRY_SECONDS = 1.0  # how often a damaged directory is looked at again

_LOGGED = 16  # names of one change that came from another process

logger = logging.getLogger("vllm.trimtab")


class ReadOnlyNameError(SteeringError):
    """The name is one that the server was started with."""


@dataclass(frozen=True)
class Entry(Generic[Content]):
    """One registered name: its content, whether the workers hold that from start, and whether the name is fixed."""

    name: str
    content: Content
    at_start: bool
    read_only: bool


class Registry(Generic[Content]):
    """Names to contents, for one or several front-end processes.

    `start` is what workers have loaded. `directory`, if given, is shared: every process that opens it sees the same
    names. Without it the registry lives in this process.
    """

    kind: ClassVar[type[SteeringVector] | type[Probe]]
    what: ClassVar[str]

    def __init__(self, start: Mapping[str, Content], directory: Path | None = None) -> None:
        for name in start:
            check_name(name, "name")
        self.start: Mapping[str, Content] = dict(start)
        self._start_digests = frozenset(content.digest for content in start.values())
        self._changing = threading.Lock()  # one change at a time
        self._lock = threading.RLock()  # held while what is below is replaced
        self._index: Index[Content] = Index()
        self._vectors: Mapping[str, Content] = self.start
        self._store = (
            None if directory is None else SharedStore[Content](directory, lambda path: _shared(self.kind.load(path)))
        )
        self._stamp: object = None
        self._fault = ""
        self._retry = 0.0
        self._said: set[str] = set()  # what the log has been told of the directory
        if self._store is not None:
            self._reload(self._store)

    def _load(self, path: Path) -> Content:
        return _shared(self.kind.load(path))  # type: ignore[return-value]

    def vectors(self) -> Mapping[str, Content]:
        """Every name and its content now. The mapping is never changed afterwards: a change makes a new one."""
        if self._store is not None:
            self._refresh(self._store)
        return self._vectors

    def entries(self) -> list[Entry[Content]]:
        """All entries, by name."""
        return [
            Entry(name, content, self.held_by_workers(content.digest), name in self.start)
            for name, content in sorted(self.vectors().items())
        ]

    def held_by_workers(self, digest: bytes) -> bool:
        """Whether workers hold this content from start, so that a request may refer to it by digest."""
        return digest in self._start_digests

    def trouble(self, name: str) -> str:
        """Why `name`, which is not among `vectors`, might yet be registered; empty if it is not."""
        stored = self._index.entries.get(name)
        return stored.fault if stored is not None else self._fault

    def add(self, name: str, content: Content) -> str | None:
        """Let `name` stand for `content` from now on; returns the digest of what it stood for, None if it is new.

        Raises `SteeringError` for a malformed name or a full registry, `ReadOnlyNameError` for a name of the start,
        `RegistryUnavailableError` where the directory cannot be changed.
        """
        self._check_changeable(check_name(name, "name"))
        with self._change() as entries:
            previous = entries.get(name)
            if previous is None and len(entries) >= MAX_REGISTERED:
                raise SteeringError("name", f"{MAX_REGISTERED} names are registered already; delete some first")
            entries[name] = Stored(content.digest.hex(), content if self._store is None else _shared(content))
        return None if previous is None else previous.digest

    def remove(self, name: str) -> str:
        """Forget `name`; returns the digest of what it stood for. Requests already admitted are untouched.

        Raises `KeyError` if it is unknown, and what `add` raises.
        """
        self._check_changeable(name)
        with self._change() as entries:
            return entries.pop(name).digest

    def _check_changeable(self, name: str) -> None:
        if name in self.start:
            said = f"the {self.what} {name!r} belongs to the start of this server, and cannot be changed or deleted"
            raise ReadOnlyNameError("name", f"{said} while it runs; register another name")

    @contextmanager
    def _change(self) -> Iterator[dict[str, Stored[Content]]]:
        store = self._store
        with self._one_at_a_time(), nullcontext() if store is None else store.exclusive():
            if store is not None:
                self._reload(store)
                if self._fault and not self._lost(store):
                    raise RegistryUnavailableError("", self._fault)
            before = self._index
            entries = dict(before.entries)
            yield entries
            index = replace(before, entries=entries)
            if store is None:
                self._take(index)
                return
            try:
                store.write(index, before)
            finally:
                self._reload(store)  # what is on disk counts, whether or not the write went through

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if not self._changing.acquire(timeout=LOCK_SECONDS):
            raise RegistryUnavailableError("", "the registry is being changed; try again")
        try:
            yield
        finally:
            self._changing.release()

    def _refresh(self, store: SharedStore[Content]) -> None:
        waiting = time.monotonic() < self._retry
        if self._fault and waiting:
            return
        try:
            if store.stamp() == self._stamp and waiting:
                return
        except RegistryUnavailableError as error:
            self._fail(error.message)
            return
        before = self._index
        self._reload(store)
        for name in sorted(before.entries.keys() | self._index.entries.keys())[:_LOGGED]:
            old, new = before.entries.get(name), self._index.entries.get(name)
            if (old and old.digest) != (new and new.digest):
                told = f"{old.digest if old else 'nothing'} -> {new.digest if new else 'nothing'}"
                logger.info("The shared registry changed %s %s: %s", self.what, name, told)

    def _reload(self, store: SharedStore[Content]) -> None:
        """Take over what the directory holds; where it cannot be read, keep what is known and say so, once."""
        with self._lock:
            try:
                stamp = store.stamp()  # taken before reading: a later write is seen as a change again
                if self._lost(store):
                    raise store.gone()
                held = [*self.start.values(), *(stored.content for stored in self._index.entries.values())]
                index = store.read({content.digest.hex(): _shared(content) for content in held if content is not None})
            except RegistryUnavailableError as error:
                self._fail(error.message)
                return
            if self._fault:
                logger.info("The registry directory of %ss is usable again", self.what)
            self._stamp, self._fault, self._said = stamp, "", self._said - {self._fault}
            damaged = [stored.fault for stored in index.entries.values() if stored.fault]
            self._retry = time.monotonic() + RETRY_SECONDS if damaged else float("inf")
            if index != self._index:
                self._take(index)
            for fault in damaged:
                self._say(f"in the registry directory of {self.what}s {fault}")
            for name in index.foreign:
                self._say(f"the registry directory of {self.what}s has an entry that is none: {name!r:.160}")
            for name in self.start.keys() & index.entries.keys():
                if (other := index.entries[name].digest) != (own := self.start[name].digest.hex()):
                    said = f"the registry directory has a {self.what} {name} ({other}), a name of this server's start"
                    self._say(f"{said}, where it stands for {own}: that of the start counts")

    def _lost(self, store: SharedStore[Content]) -> bool:
        """Whether there are names known from before and no index any more."""
        return bool(self._index.entries) and store.stamp() is None

    def _fail(self, fault: str) -> None:
        self._fault, self._retry = fault, time.monotonic() + RETRY_SECONDS
        known = f"{len(self._index.entries)} {self.what}s known from before, and those of the start, go on from memory"
        self._say(f"{fault}. {known}", fault)

    def _say(self, text: str, key: str = "") -> None:
        if (key or text) not in self._said:
            self._said.add(key or text)
            logger.warning("Steering: %s", text)

    def _take(self, index: Index[Content]) -> None:
        with self._lock:
            registered = {name: stored.content for name, stored in index.entries.items() if stored.content is not None}
            self._index = index
            self._vectors = {**registered, **self.start}  # the start's names always stand for what it gave them


class VectorRegistry(Registry[SteeringVector]):
    """Names of vectors."""

    kind = SteeringVector
    what = "vector"


class ProbeRegistry(Registry[Probe]):
    """Names of probes."""

    kind = Probe
    what = "probe"


def _shared(content: Content) -> Content:
    """`content` as a directory keeps it: known by the digest of its numbers, which says nothing of streams."""
    return without_stream_norms(content) if isinstance(content, SteeringVector) else content  # type: ignore[return-value]


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

    It goes when this process ends. A directory named by the operator in the environment is used and kept. Raises
    `SteeringError` where none can be made.
    """
    if processes < 2 or os.environ.get(DIRECTORY_VARIABLE):
        return
    try:
        directory = tempfile.mkdtemp(prefix="trimtab-registry-")
    except OSError as error:
        raise SteeringError(DIRECTORY_VARIABLE, f"no temporary directory can be made ({error}): name one") from error
    os.environ[DIRECTORY_VARIABLE] = directory  # what the processes inherit
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(directory, ignore_errors=True) if os.getpid() == owner else None)


def shared_directory() -> Path | None:
    """The directory prepared by `share_registry` in this process or the one that started it."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    return Path(directory) if directory else None
