"""How much of a server's default spec a request's own part leaves in force: what a binding default promises.

Let d be what the default adds at a site in a phase, behind one gate or behind none, and r what a request adds there:

    share left = 1 + (r_0 . d + sum over gates of min(0, r_k . d)) / (d . d)

r_0 stands behind no gate, and counts both ways where d stands behind none either. Every other r_k counts where it takes
back, as if its gate were wide open then: also one behind the default's own gate, since what pushes behind a gate that
is half open cannot make up for what takes back behind none. An engine's monitor is such a gate before what a request
adds; the default is measured with it open, as with its own gates. 1 is all of the default's push along its own
direction, 0 none, below 0 the reverse.

What slots of a request take is bounded from below, whatever their gates, bounds and layers do to each other. Slots that
move a projection towards 0 or a bound, one at a site, make no change of the stream longer and change it within the span
W of all their directions. Of d, whose part in W is d_W, that leaves at least

    1 - 2 (d_W . d_W) / (d . d) - 2 |d_W| sum |r| / (d . d)

where the r are all that the request adds, or writes of itself as a clamp to a value does. Where one of its slots is
none of these (several at one site, whose numbers are mixed; what makes a projection larger; what writes along another
direction than it reads), all that W has a part of counts as taken. So does what meets a slot that looks at the whole
stream: replacing it, adding by its norm, keeping its norm. What the slots of a default do is not measured, so beside
them whatever a request does counts as taking all.

The stream carries on what was added to it before. So the share is taken twice: of what is added at each site of the
default, and, at each site of either, of all that was added to the stream up to there. What a request takes back in the
layer before or after the default, or at another hook point with the same meaning, counts like what it takes back there.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.program import SPANS, PhaseProgram, ResolvedSteering, Slot
from trimtab.program.slots import counted
from trimtab.recent import Recent
from trimtab.responses import CLIP, Stage
from trimtab.sites import HookPoint, Phase, Site, site_order

LEAST_SHARE = 0.5  # of a binding default

_ROUNDING = 1e-6

_NOT_OF_THE_STREAM = frozenset({HookPoint.MLP_IN})  # what is added there is gone behind the MLP

Rows = npt.NDArray[np.float64]  # [sites, H]

_SPANS: Recent[Rows] = Recent(1 << 10, 16 << 20)  # of the directions of slots, by their row keys and sites


class Share(NamedTuple):
    """The share of a default that is left, and where."""

    left: float
    phase: Phase
    site: Site

    @property
    def keeps_the_promise(self) -> bool:
        """Whether a binding default allows it."""
        return self.left >= LEAST_SHARE - _ROUNDING


def least_share(default: ResolvedSteering, own: ResolvedSteering) -> Share | None:
    """The least share that a request's `own` part leaves of the server's `default`; None where they never meet."""
    shares: list[Share] = []
    seen: set[tuple[int, int]] = set()
    for phase, pushing, taking in zip(SPANS, default.programs, own.programs, strict=True):
        pair = id(pushing), id(taking)
        if pair not in seen and pushing.sites and taking.sites:
            shares.extend(_shares(pushing, taking, phase))
        seen.add(pair)
    return min(shares, key=lambda share: share.left, default=None)


def _shares(default: PhaseProgram, own: PhaseProgram, phase: Phase) -> Iterator[Share]:
    if default.slots:
        yield Share(0.0, phase, default.slots[0].sites[0])
    sites = sorted({*default.sites, *own.sites}, key=site_order)
    theirs = _sums(own, sites)
    carried = {gate: _carried(rows, sites) for gate, rows in theirs.items()}
    slots = _Slots(own.slots, sum(float(np.linalg.norm(rows, axis=1).sum()) for rows in theirs.values()))
    for gate, added in _sums(default, sites).items():
        held = _carried(added, sites)
        along = any((rows @ added.T).any() for rows in theirs.values())
        touched = slots.within(added).any() or slots.within(held).any()
        for index, site in enumerate(sites):
            meets = site in slots.looking and (along or held[index].any() or added[index].any())
            if meets or (touched and not slots.are_bounded):
                yield Share(0.0, phase, site)
        for rows, others in ((added, theirs), (held, carried)):
            yield from _lowest(rows, slots.taken(rows), others, gate, sites, phase)


class _Slots:
    """What the slots of a request take of a change of the stream, at most."""

    def __init__(self, slots: Iterable[Slot], added: float) -> None:
        """`added` is the length of all that the request adds."""
        slots = tuple(slots)
        self.looking = {site for slot in slots if slot.stage is not Stage.LOCAL for site in slot.sites}
        together = counted(slots)
        self.are_bounded = all(
            slot.is_member and _moves_back(slot, site) and together[site] == 1 for slot in slots for site in slot.sites
        )
        self._added = added + sum(_written(slot, site) for slot in slots for site in slot.sites if self.are_bounded)
        self._span = _span(slots)

    def within(self, rows: Rows) -> npt.NDArray[np.float64]:
        """The length of what changes [S, H] have in the span of the slots' directions, [S]."""
        if self._span is None:
            return np.zeros(len(rows))
        lengths = np.linalg.norm(rows @ self._span.T, axis=1)
        return np.where(lengths > _ROUNDING * np.linalg.norm(rows, axis=1), lengths, 0.0)

    def taken(self, rows: Rows) -> npt.NDArray[np.float64]:
        """How much of (d . d) slots that are bounded take of changes [S, H] at most; 0 where they are not."""
        if not self.are_bounded:
            return np.zeros(len(rows))
        within = self.within(rows)
        return 2.0 * within * (within + self._added)


def _moves_back(slot: Slot, site: Site) -> bool:
    """Whether a slot makes no change of the stream longer."""
    return slot.response == CLIP.name and 0.0 <= slot.at[site].own[0] <= 2.0


def _written(slot: Slot, site: Site) -> float:
    """The length of what a clip along a unit vector writes where the stream has nothing along it."""
    bias, (strength, low, high) = slot.at[site]
    return abs(strength * (min(max(bias, low), high) - bias))


def _span(slots: Sequence[Slot]) -> Rows | None:
    """Orthonormal rows that span all directions of `slots` where they act; None if there are none. Remembered: requests
    bring the same directions again and again, with other numbers."""
    ways = {(way.row_key, slot.sites): way for slot in slots for way in slot.directions}
    known = _SPANS.get(key := frozenset(ways))
    if known is None:
        known = _basis([way.values(sites) for (_, sites), way in ways.items()])
        if known is not None:
            _SPANS.put(key, known, known.nbytes)
    return known


def _basis(directions: Sequence[Rows]) -> Rows | None:
    """Orthonormal rows that span all `directions`; None if there are none."""
    if not directions:
        return None
    rows = np.concatenate(directions)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.unique(rows[lengths[:, 0] > 0.0] / lengths[lengths[:, 0] > 0.0], axis=0)  # a spread one is one
    values, vectors = np.linalg.eigh(rows @ rows.T)
    kept = values > _ROUNDING**2 * values.max(initial=0.0)
    spanning: Rows = (vectors[:, kept].T @ rows) / np.sqrt(values[kept])[:, None]
    return spanning


def _carried(rows: Rows, sites: Sequence[Site]) -> Rows:
    """What the stream holds at each site of what was added up to there."""
    result = np.empty_like(rows)
    total = np.zeros(rows.shape[1])
    for index, site in enumerate(sites):  # faster than `cumsum` along the first axis
        if site.hook not in _NOT_OF_THE_STREAM:
            total += rows[index]
        result[index] = total
    return result


def _lowest(
    added: Rows, taken: Rows, theirs: dict[bytes, Rows], gate: bytes, sites: Sequence[Site], phase: Phase
) -> Iterator[Share]:
    strength = np.einsum("sh,sh->s", added, added)
    whole = strength - taken
    for other, rows in theirs.items():
        along = np.einsum("sh,sh->s", rows, added)
        whole += along if other == gate == b"" else np.minimum(along, 0.0)
    acts = strength > strength.max(initial=0.0) * _ROUNDING**2  # where a default takes itself back, little is left
    if acts.any():
        shares = np.where(acts, whole / np.where(acts, strength, 1.0), np.inf)
        index = int(shares.argmin())
        yield Share(float(shares[index]), phase, sites[index])


def _sums(program: PhaseProgram, sites: Sequence[Site]) -> dict[bytes, Rows]:
    """What a program adds at `sites`, by the digest of the gate before it, b"" for none."""
    index = {site: position for position, site in enumerate(sites)}
    sums: dict[bytes, Rows] = {}
    for term in program.all_terms:
        gate = b"" if term.gate is None else term.gate.digest
        if gate not in sums:
            sums[gate] = np.zeros((len(sites), term.vector.hidden_size))
        sums[gate][[index[site] for site in term.vector.sites]] += term.scale * term.vector.block.astype(np.float64)
    return sums
