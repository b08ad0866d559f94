"""A bounded memory of what was made lately: what comes again and again is made once, and no caller can fill it."""

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

KEPT = 1024  # values
KEPT_BYTES = 32 << 20  # of what they hold that nothing else does

Made = TypeVar("Made")


class Recent(Generic[Made]):
    """A bounded memory, oldest out first. Safe in threads that share it: at worst a value is made twice."""

    def __init__(self, kept: int = KEPT, kept_bytes: int = KEPT_BYTES) -> None:
        """It holds at most `kept` values, and `kept_bytes` of what they hold that nothing else does."""
        self._kept, self._kept_bytes = kept, kept_bytes
        self._made: dict[Hashable, tuple[Made, int]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Made | None:
        """What was made of the value with this `key`; None if that is forgotten or never was."""
        found = None if key is None else self._made.get(key)
        return None if found is None else found[0]

    def put(self, key: Hashable, made: Made, nbytes: int = 0) -> None:
        """Remember `made`, which must not change any more and keeps `nbytes` alive. Not if the value has no key."""
        if key is None or nbytes > self._kept_bytes:
            return
        with self._lock:
            self._bytes += nbytes - self._made.pop(key, (made, 0))[1]
            self._made[key] = made, nbytes
            while len(self._made) > self._kept or self._bytes > self._kept_bytes:
                _, freed = self._made.pop(next(iter(self._made)))
                self._bytes -= freed
