"""What tells small values of one form apart: clients send the same few specs again and again."""

from collections.abc import Hashable
from typing import Any, cast

_LONGEST, _MOST, _DEEPEST = 256, 64, 8  # of a text, of the items of a list or object, of their nesting
_MOST_PARTS = 256  # of all lists and objects together, so that a thousand keys are no burden
_LONGEST_ALONE = 4096  # of a text that is the whole value, as specs written in JSON are


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
