"""How much of a server's default spec a request's own part leaves in force: what a binding default promises.

Let d be what the default adds at a site in a phase, behind one gate or behind none, and r what a request adds there:

    share left = 1 + (r_0 . d + sum over gates of min(0, r_k . d)) / (d . d)

r_0 stands behind no gate, and counts both ways where d stands behind none either. Every other r_k counts where it takes
back, as if its gate were wide open then: also one behind the default's own gate, since what pushes behind a gate that
is half open cannot make up for what takes back behind none. An engine's monitor is such a gate before what a request
adds; the default is measured with it open, as with its own gates. 1 is all of the default's push along its own
direction, 0 none, below 0 the reverse.

What slots of a request take of that is bounded by `trimtab.serving.slot_losses`. Where a slot looks at the whole
stream (replacing it, adding by its norm, keeping its norm), at a site of the default or behind one, all counts as
taken: what is added at `mlp_in` does not stay in the stream, but what the MLP made of it does. What the slots of a
default do is not measured, so beside them whatever a request does counts as taking all.

Where a default or a request has spans, this is so of each two programs that one token may receive.

The stream carries on what was added to it before. So the share is taken twice: of what is added at each site of the
default, and, at each site of either, of all that was added to the stream up to there. What a request takes back in the
layer before or after the default, or at another hook point with the same meaning, counts like what it takes back there.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.program import PhaseProgram, ResolvedSteering
from trimtab.responses import Stage
from trimtab.serving.slot_losses import Rows, slot_losses
from trimtab.sites import HookPoint, Phase, Site, site_order

LEAST_SHARE = 0.5  # of a binding default

_ROUNDING = 1e-6

_LEAST = -1e30  # of shares, so that every one is a number: what slots take at most may have no bound

_NOT_OF_THE_STREAM = frozenset({HookPoint.MLP_IN})  # what is added there is gone behind the MLP


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
    for phase, pushing, taking in _meeting(default, own):
        pair = id(pushing), id(taking)
        if pair not in seen and pushing.sites and taking.sites:
            shares.extend(_shares(pushing, taking, phase))
        seen.add(pair)
    return min(shares, key=lambda share: share.left, default=None)


def _meeting(default: ResolvedSteering, own: ResolvedSteering) -> Iterator[tuple[Phase, PhaseProgram, PhaseProgram]]:
    """The programs of both that one token may receive. Where tokens decide, any of theirs may be."""
    ours, theirs = default.spans, own.spans
    pairs = {(_received(default), _received(own))}
    if ours is not None and theirs is not None and ours.prompt_length == theirs.prompt_length:
        pairs = {(ours.programs_at(edge), theirs.programs_at(edge)) for edge in {*ours.starts, *theirs.starts}}
    for one, other in sorted({places for pair in pairs for places in product(*pair)}):
        if default.phases[one] is own.phases[other]:
            yield default.phases[one], default.programs[one], own.programs[other]


def _received(steering: ResolvedSteering) -> tuple[int, ...]:
    """The places of programs that some token may receive."""
    return tuple(range(len(steering.programs)) if steering.spans is None else steering.spans.used)


def _shares(default: PhaseProgram, own: PhaseProgram, phase: Phase) -> Iterator[Share]:
    if default.slots:
        yield Share(0.0, phase, default.slots[0].sites[0])
    sites = sorted({*default.sites, *own.sites}, key=site_order)
    theirs, ours = _sums(own, sites), _sums(default, sites)
    carried = {gate: _carried(rows, sites) for gate, rows in theirs.items()}
    slots = slot_losses(own.slots, ours.values(), theirs.values())
    looking = {site for slot in own.slots if slot.stage is not Stage.LOCAL for site in slot.sites}
    for gate, added in ours.items():
        held = _carried(added, sites)
        along = any((rows @ added.T).any() for rows in theirs.values())
        present = np.logical_or.accumulate(added.any(axis=1))  # what it did stays, as do the answers of branches to it
        meets = np.array([site in looking for site in sites]) & (along | present)
        gone = np.logical_or.accumulate(meets)
        if gone.any():  # of an addition of which nothing is in the stream there, too
            yield Share(0.0, phase, sites[int(meets.argmax())])
        for rows, others, taken in ((added, theirs, slots.of_each(added)), (held, carried, slots.of_sums(held))):
            yield from _lowest(rows, taken, gone, others, gate, sites, phase)


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
    added: Rows,
    taken: Rows,
    gone: npt.NDArray[np.bool_],
    theirs: dict[bytes, Rows],
    gate: bytes,
    sites: Sequence[Site],
    phase: Phase,
) -> Iterator[Share]:
    """The least share of rows [S, H], of which slots take so much, [S]; where all else is `gone`."""
    strength = np.einsum("sh,sh->s", added, added)
    whole = np.where(gone, 0.0, strength) - taken
    for other, rows in theirs.items():
        along = np.einsum("sh,sh->s", rows, added)
        whole += np.where(gone, np.minimum(along, 0.0), along) if other == gate == b"" else np.minimum(along, 0.0)
    acts = strength > strength.max(initial=0.0) * _ROUNDING**2  # where a default takes itself back, little is left
    if acts.any():
        shares = np.where(acts, whole / np.where(acts, strength, 1.0), np.inf)
        index = int(shares.argmin())
        yield Share(max(float(shares[index]), _LEAST), phase, sites[index])


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
