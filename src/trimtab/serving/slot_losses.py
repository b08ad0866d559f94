"""How much slots of a request take of what a server's default adds, at most: whatever their gates and tokens are.

Two bounds, both for a default of which d is a sum of additions, and no number is so small that it is left out.

**Slots that only move a projection towards 0 or a bound, one at a site.** What they take of the model's own stream is
not counted: it is not the default's. They make no change of the stream longer, and change it within the span W of their
directions alone. What was put into W is at most `within` long: what the default adds within W, and all that the request
adds or its slots write of themselves. So along d they take at most

    2 |d_W| within + 5 |d| rest

Directions that nearly depend on others are left out of W. `rest` is the sum of what they have beyond W, slot by slot
and site by site, times the length of all that was added: five times that is what their beyond can do to both parts.

**All others.** A slot writes a number c along a direction w. So all slots together take at most

    sum over slots and sites of |w . d| most |c|

where most |c| follows from the length of the stream: `LONGEST` as the model makes it, with all that is added, and at
each site as much longer as the slots before it could have made it. What is orthogonal to d in float32 loses a little
then, more at large numbers, and what is so in float64 loses nothing.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from trimtab.program import Slot
from trimtab.program.ranges import MAX_VALUE
from trimtab.program.slots import Direction, counted
from trimtab.recent import Recent
from trimtab.responses import CLIP, FEATURE, NORM, REPLACE, TURN, Stage
from trimtab.sites import Site, site_order

LONGEST = MAX_VALUE
"""How long a token's stream is taken to be, at most, as the model makes it: longer ones float16 could not hold."""

_DEPENDENT = 1e-5  # of the length of unit vectors: what is shorter is left out of the span, and counted as its rest

_ENDLESS = 1e300  # more than any number of a stream; times an overlap of 0 it is 0

Rows = npt.NDArray[np.float64]  # [sites, H]


class Span(NamedTuple):
    """What directions span, but for what nearly depends on others."""

    columns: Rows  # [H, D], orthonormal
    beyond: float  # the sum of what each direction, at length 1, has beyond that at each of its sites


_SPANS: Recent[Span] = Recent(1 << 10, 16 << 20)  # of the directions of slots, by their row keys and sites


class Losses(Protocol):
    """What slots take of (d . d) at most, for each row d of [S, H]; the sites are those of the default's rows."""

    def of_each(self, added: Rows) -> Rows:
        """[S], of what is added at each site."""

    def of_sums(self, held: Rows) -> Rows:
        """[S], of all that was added up to each site."""


def slot_losses(slots: Sequence[Slot], ours: Iterable[Rows], theirs: Iterable[Rows]) -> Losses:
    """The losses by a request's `slots`, beside what the default (`ours`) and the request (`theirs`) add, [S, H] each
    behind some gate or none."""
    ours = list(ours)
    added = sum(_length(rows) for rows in theirs)
    together = counted(slots)
    if all(_moves_back(slot, site) and together[site] == 1 for slot in slots for site in slot.sites):
        return _MovingBack(slots, ours, added)
    return _Writing(slots, added + sum(map(_length, ours)))


class _MovingBack:
    """Slots that only move projections back, one at a site."""

    def __init__(self, slots: Sequence[Slot], ours: Sequence[Rows], added: float) -> None:
        self._added = added + sum(_written(slot, site) for slot in slots for site in slot.sites)
        self._span = span_of(slots)
        beyond = 0.0 if self._span is None else self._span.beyond
        self._rest = 5.0 * beyond * (self._added + sum(map(_length, ours)))
        self._put_in = np.cumsum(sum((self._within(rows) for rows in ours), np.zeros(1))) + self._added

    def of_each(self, added: Rows) -> Rows:
        """Of each by itself: it is in the span as far as it was put there."""
        within = self._within(added)
        return self._taken(added, within, within + self._added)

    def of_sums(self, held: Rows) -> Rows:
        """Of the sums, of which parts may have taken back what others added."""
        return self._taken(held, self._within(held), self._put_in)

    def _taken(self, rows: Rows, within: Rows, put_in: Rows) -> Rows:
        taken: Rows = 2.0 * within * put_in + self._rest * np.linalg.norm(rows, axis=1)
        return taken

    def _within(self, rows: Rows) -> Rows:
        """The length of what rows [S, H] have in the span of the directions, [S]."""
        return np.zeros(len(rows)) if self._span is None else np.linalg.norm(rows @ self._span.columns, axis=1)


class _Writing:
    """Slots of any kind."""

    def __init__(self, slots: Sequence[Slot], added: float) -> None:
        most = LONGEST + added
        self._ways: list[Rows] = []
        self._numbers: list[Rows] = []
        for site in sorted({site for slot in slots for site in slot.sites}, key=site_order):
            acting = [slot for slot in slots if site in slot.at]
            for stage in (Stage.FIRST, Stage.LOCAL):  # what acts last has no direction
                if some := [slot for slot in acting if slot.stage is stage]:
                    most = min(self._write(some, site, most), _ENDLESS)

    def of_each(self, added: Rows) -> Rows:
        """All that could be written against them."""
        taken = np.zeros(len(added))
        for ways, numbers in zip(self._ways, self._numbers, strict=True):
            taken += numbers @ np.abs(ways @ added.T)
        return taken

    of_sums = of_each

    def _write(self, slots: Sequence[Slot], site: Site, most: float) -> float:
        """Notes what slots of one stage write at a site where the stream is at most so long; how long it is then."""
        reads, writes = _directions(slots, site)
        scores = np.linalg.norm(reads, axis=1) * most + [abs(slot.at[site].bias) for slot in slots]
        numbers = [_most(slot, site, float(score), most) for slot, score in zip(slots, scores, strict=True)]
        self._ways.append(writes)
        self._numbers.append(np.minimum(numbers, _ENDLESS))
        if _turns_a_plane(slots):
            return most
        if _is_linear(slots, site):
            affine = [_beside(slot, site) for slot in slots]
            growth = _growth(reads, writes, np.array([slot.at[site].own[0] for slot in slots]))
            return growth * most + float(affine @ np.linalg.norm(writes, axis=1))
        return most + float(self._numbers[-1] @ np.linalg.norm(writes, axis=1))


def _directions(slots: Sequence[Slot], site: Site) -> tuple[Rows, Rows]:
    """What slots read along at a site [K, H], and along what each one's number is written: of a set mixed."""
    width = max(slot.hidden_size for slot in slots)
    reads, writes = np.zeros((len(slots), width)), np.zeros((len(slots), width))
    for index, slot in enumerate(slots):
        reads[index] = _values(slot.read, site, width)
        writes[index] = _values(slot.write, site, width)
    members = np.array([slot.is_member for slot in slots])
    if members.any():
        writes[members] = np.linalg.pinv(reads[members]).T
    return reads, writes


def _values(way: Direction | None, site: Site, width: int) -> Rows:
    return np.zeros(width) if way is None else way.values((site,))[0]


def _most(slot: Slot, site: Site, score: float, most: float) -> float:
    """The largest number that a slot makes of a score that is at most so large, of a stream at most so long."""
    own = slot.at[site].own
    if slot.response == CLIP.name:
        return abs(own[0]) * (score + _bound(*own[1:]))
    if slot.response == TURN.name:
        return most * (abs(own[0]) + abs(own[1]) + abs(own[2]))
    if slot.response == FEATURE.name:
        _, scale, add, low, high, off = own
        return (abs(scale) + 1.0) * score + abs(add) + _bound(low, high) + abs(off)
    if slot.response == REPLACE.name:
        return own[0]
    return abs(own[0]) * most if slot.response == NORM.name else math.inf


def _bound(low: float, high: float) -> float:
    return max((abs(bound) for bound in (low, high) if math.isfinite(bound)), default=0.0)


def _turns_a_plane(slots: Sequence[Slot]) -> bool:
    """Whether they are one rotation, which keeps lengths; where its gate is half open, it makes none longer."""
    turning = len(slots) == 2 and all(slot.response == TURN.name for slot in slots)
    return turning and (slots[0].read, slots[0].gate) == (slots[1].second, slots[1].gate)


def _is_linear(slots: Sequence[Slot], site: Site) -> bool:
    """Whether what they do lies between nothing and one linear map, but for what `_beside` bounds."""
    clips = all(slot.response == CLIP.name for slot in slots)
    whole = all(slot.at[site].own[1:] == (0.0, 0.0) and slot.gate == slots[0].gate for slot in slots)
    return clips and (whole or len(slots) == 1)


def _beside(slot: Slot, site: Site) -> float:
    """What a clip writes that does not grow with the stream."""
    bias, (strength, low, high) = slot.at[site]
    return abs(strength) * (abs(bias) + _bound(low, high))


def _growth(reads: Rows, writes: Rows, strengths: Rows) -> float:
    """How much longer clips to 0 make a stream at most: the norm of 1 - W^T S A, or 1."""
    span, _ = np.linalg.qr(np.concatenate([reads, writes]).T)
    linear = np.eye(span.shape[1]) - (writes @ span).T @ (strengths[:, None] * (reads @ span))
    return max(1.0, float(np.linalg.norm(linear, 2)))


def _moves_back(slot: Slot, site: Site) -> bool:
    """Whether a slot makes no change of the stream longer."""
    return slot.is_member and slot.response == CLIP.name and 0.0 <= slot.at[site].own[0] <= 2.0


def _written(slot: Slot, site: Site) -> float:
    """The length of what a clip along a unit vector writes where the stream has nothing along it."""
    bias, (strength, low, high) = slot.at[site]
    return abs(strength * (min(max(bias, low), high) - bias))


def span_of(slots: Sequence[Slot]) -> Span | None:
    """What all directions of `slots` span where they act; None if there are none. Remembered: requests bring the same
    directions again and again, with other numbers."""
    ways = {(way.row_key, slot.sites): way for slot in slots for way in slot.directions}
    known = _SPANS.get(key := frozenset(ways))
    if known is None and ways:
        known = _span(np.concatenate([way.values(sites) for (_, sites), way in ways.items()]))
        _SPANS.put(key, known, known.columns.nbytes)
    return known


def _span(directions: Rows) -> Span:
    """That of `directions` [N, H], none of which is zero."""
    rows = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    rows, counts = np.unique(rows, axis=0, return_counts=True)  # a spread one is one
    values, vectors = np.linalg.eigh(rows @ rows.T)
    kept = values > _DEPENDENT**2 * values.max()
    columns, _ = np.linalg.qr(rows.T @ vectors[:, kept])
    return Span(columns, float(counts @ np.linalg.norm(rows - (rows @ columns) @ columns.T, axis=1)))


def _length(rows: Rows) -> float:
    return float(np.linalg.norm(rows, axis=1).sum())
