"""What was made of the last few small values of one form: clients send the same few specs again and again."""

import threading
from collections.abc import Hashable
from typing import Any, Generic, TypeVar, cast

KEPT = 1024  # values
KEPT_BYTES = 32 << 20  # of what they hold that nothing else does
_LONGEST, _MOST, _DEEPEST = 256, 64, 8  # of a text, of the items of a list or object, of their nesting
_MOST_PARTS = 256  # of all lists and objects together, so that `KEPT` keys are no burden
_LONGEST_ALONE = 4096  # of a text that is the whole value, as specs written in JSON are

Made = TypeVar("Made")


class Recent(Generic[Made]):
    """A bounded memory, oldest out first. Safe in threads that share it: at worst a value is made twice."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Made, int]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Made | None:
        """What was made of the value with this `key`; None if that is forgotten or never was."""
        found = None if key is None else self._made.get(key)
        return None if found is None else found[0]

    def put(self, key: Hashable, made: Made, nbytes: int = 0) -> None:
        """Remember `made`, which must not change any more and keeps `nbytes` alive. Not if the value has no key."""
        if key is None or nbytes > KEPT_BYTES:
            return
        with self._lock:
            self._bytes += nbytes - self._made.pop(key, (made, 0))[1]
            self._made[key] = made, nbytes
            while len(self._made) > KEPT or self._bytes > KEPT_BYTES:
                _, freed = self._made.pop(next(iter(self._made)))
                self._bytes -= freed


def key_of(value: Any) -> Hashable:
    """A key that holds all of a small value made of plain lists, objects, texts and numbers; None for any other.

    Values with equal keys are equal in every part and in its type, so whatever is made of them is equal, or refused,
    alike. Content of vectors has no key: it is large, and seldom comes twice.
    """
    if type(value) is str and len(value) <= _LONGEST_ALONE:
        return value
    try:
        return _key(value, _DEEPEST, [_MOST_PARTS])
    except _NoKeyError:
        return None


class _NoKeyError(Exception):
    pass


def _key(value: Any, depth: int, left: list[int]) -> Hashable:
    """`left` is one number, which all calls for one value share: how many parts it may yet have."""
    kind = type(value)
    left[0] -= 1
    if left[0] < 0:
        raise _NoKeyError
    if kind is int or value is None or ((kind is str or kind is bytes) and len(value) <= _LONGEST):
        return cast(Hashable, value)
    if kind is float or kind is bool:
        return kind, value  # True and 1.0 equal 1, and are not the same in a spec
    if (kind is dict or kind is list) and len(value) <= _MOST and depth:
        parts = value if kind is list else [part for item in reversed(value.items()) for part in reversed(item)]
        return kind, *[
            _key(part, depth - 1, left) for part in parts
        ]  # an object's last value first: there content stands
    raise _NoKeyError
