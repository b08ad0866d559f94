"""How much of a server's default spec a request's own part leaves in force: what a binding default promises.

Let d be what the default adds at a site in a phase, behind one gate or behind none, and r what a request adds there:

    share left = 1 + (r_0 . d + sum over gates of min(0, r_k . d)) / (d . d)

r_0 stands behind no gate, and counts both ways where d stands behind none either. Every other r_k counts where it takes
back, as if its gate were wide open then: also one behind the default's own gate, since what pushes behind a gate that
is half open cannot make up for what takes back behind none. An engine's monitor is such a gate before what a request
adds; the default is measured with it open, as with its own gates. 1 is all of the default's push along its own
direction, 0 none, below 0 the reverse.

A slot of the request that turns the stream's projection back, as ablation does, takes of d what it would take of any
change there: it is counted with its gate wide open and outside of its bounds, where it takes most, and where it would
add to d it is not counted. What it writes whatever the stream is, as a clamp to a value does, counts as what is added
behind a gate. What slots of a default do is not measured: at their own sites nothing that a request adds
undoes it, since slots act after all that is added, and another slot on one of their directions is refused.

What a request does that looks at the whole stream, replacing it, adding by its norm, or keeping its norm, may take any
share of what the stream holds. It counts as if it took all.

The stream carries on what was added to it before. So the share is taken twice: of what is added at each site of the
default, and, at each site of either, of all that was added to the stream up to there. What a request takes back in the
layer before or after the default, or at another hook point with the same meaning, counts like what it takes back there.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.program import SPANS, PhaseProgram, ResolvedSteering, Slot
from trimtab.program.slot_sets import mixing
from trimtab.responses import CLIP, TURN, Stage
from trimtab.sites import HookPoint, Phase, Site, site_order

LEAST_SHARE = 0.5  # of a binding default

_ROUNDING = 1e-6

_NOT_OF_THE_STREAM = frozenset({HookPoint.MLP_IN})  # what is added there is gone behind the MLP

_OF_A_BRANCH = frozenset({HookPoint.MLP_IN, HookPoint.MLP_OUT})  # what slots there read is not the whole stream

Rows = npt.NDArray[np.float64]  # [sites, H]
Row = npt.NDArray[np.float64]  # [H]


class _Turn(NamedTuple):
    """A slot as it acts on a change d of the stream at a site, at most: what it writes along `write` changes by
    d . linear, and up to `spread` of the length of what d has along `reads` more or less."""

    slot: bytes  # its digest
    write: Row
    linear: Row
    reads: Rows
    spread: float = 0.0
    constant: float = 0.0  # what it writes where the stream has nothing along what it reads


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
    sites = sorted({*default.sites, *own.sites}, key=site_order)
    turning = [_turning(own.slots, site) for site in sites]
    theirs = _sums(own, sites) | _written(turning)
    carried = {gate: _carried(rows, sites) for gate, rows in theirs.items()}
    looking = {site for slot in own.slots if slot.stage is not Stage.LOCAL for site in slot.sites}
    for gate, added in _sums(default, sites).items():
        for site, held, here in zip(sites, _carried(added, sites), added, strict=True):
            if site in looking and (held.any() or here.any()):
                yield Share(0.0, phase, site)
        left = np.stack([_turned(row, slots) for row, slots in zip(added, turning, strict=True)])
        yield from _lowest(added, left, theirs, gate, sites, phase)
        yield from _lowest(_carried(added, sites), _carried(added, sites, turning), carried, gate, sites, phase)


def _carried(rows: Rows, sites: Sequence[Site], turning: Sequence[Sequence[_Turn]] | None = None) -> Rows:
    """What the stream holds at each site of what was added up to there, and of what slots have left of it."""
    result = np.empty_like(rows)
    total = np.zeros(rows.shape[1])
    for index, site in enumerate(sites):  # faster than `cumsum` along the first axis
        if site.hook not in _NOT_OF_THE_STREAM:
            total += rows[index]
        if turning is not None and site.hook not in _OF_A_BRANCH:
            total = _turned(total, turning[index])
        result[index] = total
    return result


def _turning(slots: Iterable[Slot], site: Site) -> list[_Turn]:
    """What the slots that act at `site` do to a change of the stream there, at most."""
    acting = [(slot, slot.read.values([site])[0]) for slot in slots if slot.read is not None and site in slot.at]
    if not acting:
        return []
    reads = np.stack([read for _, read in acting])
    mixed = mixing(reads, np.array([slot.is_member for slot, _ in acting])) @ reads  # along which numbers are written
    turning = []
    for (slot, read), along in zip(acting, mixed, strict=True):
        write = along if slot.write is None else slot.write.values([site])[0]
        turning.append(_turn(slot, read, write, site))
    return turning


def _turn(slot: Slot, read: Row, write: Row, site: Site) -> _Turn:
    bias, own = slot.at[site]
    if slot.response == CLIP.name:  # falls by its strength as its score grows, outside of its bounds
        strength, low, high = own
        constant = strength * (min(max(bias, low), high) - bias)
        return _Turn(slot.digest, write, -strength * read, read[None], constant=constant)
    if slot.response == TURN.name and slot.second is not None:
        second = slot.second.values([site])[0]
        return _Turn(slot.digest, write, own[0] * read + own[1] * second, np.stack([read, second]), abs(own[2]))
    return _Turn(slot.digest, write, np.zeros_like(read), read[None], 1.0)  # as much as there is, in either direction


def _written(turning: Sequence[Sequence[_Turn]]) -> dict[bytes, Rows]:
    """What each slot adds at each site whatever the stream is, as a sum of its own behind a gate."""
    written: dict[bytes, Rows] = {}
    for index, slots in enumerate(turning):
        for slot in slots:
            if slot.constant:
                rows = written.setdefault(slot.slot, np.zeros((len(turning), len(slot.write))))
                rows[index] += slot.constant * slot.write
    return written


def _turned(change: Row, slots: Iterable[_Turn]) -> Row:
    """What is left of a change of the stream, by slots that turn it back."""
    left = change
    for slot in slots:
        along = float(slot.write @ change)
        number = float(slot.linear @ change) - np.sign(along) * slot.spread * float(np.linalg.norm(slot.reads @ change))
        if number * along < 0.0:
            left = left + number * slot.write
    return left


def _lowest(
    added: Rows, left: Rows, theirs: dict[bytes, Rows], gate: bytes, sites: Sequence[Site], phase: Phase
) -> Iterator[Share]:
    strength = np.einsum("sh,sh->s", added, added)
    whole = np.einsum("sh,sh->s", left, added)
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
