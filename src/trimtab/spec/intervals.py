"""Sets of positions as half-open intervals: sorted, not empty, and not touching each other."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Intervals = tuple[tuple[int, int], ...]

OPEN = 1 << 40
"""Behind every position: where an interval without end stops."""

EVERYTHING: Intervals = ((0, OPEN),)


def joined(some: Iterable[tuple[int, int]]) -> Intervals:
    """All positions of `some`, which may lie anyhow; those that stop before they begin hold none."""
    found: list[tuple[int, int]] = []
    for first, stop in sorted(some):
        if first >= stop:
            continue
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((first, stop))
    return tuple(found)


def less(some: Intervals, others: Intervals) -> Intervals:
    """The positions of `some` that are in none of `others`."""
    if not others or not some:
        return some
    found: list[tuple[int, int]] = []
    place = 0
    for first, stop in some:
        while place < len(others) and others[place][1] <= first:
            place += 1
        at = place
        while at < len(others) and others[at][0] < stop:
            if first < others[at][0]:
                found.append((first, others[at][0]))
            first = max(first, others[at][1])
            at += 1
        if first < stop:
            found.append((first, stop))
    return tuple(found)


def common(some: Intervals, others: Intervals) -> Intervals:
    """The positions of both."""
    return less(some, less(EVERYTHING, others))


def where_true(flags: npt.NDArray[np.bool_]) -> Intervals:
    """The positions of the true ones of `flags`, [n]."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def of_numbers(numbers: Sequence[int]) -> Intervals:
    """The intervals that hold just `numbers`."""
    return joined((number, number + 1) for number in numbers)
