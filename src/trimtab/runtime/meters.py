"""What gates did: tokens evaluated, mean factor, and how many exceeded one half, per request and per probe.

The factors of each forward pass are kept behind it, and added up once they have reached the host (`runtime.passes`):
passes later, many at a time. `report` and `totals` wait, and are called between steps.

What is kept is bounded: of requests that are gone the last `KEPT_REPORTS` owners, of each only names and sums; in
totals `MOST_LABELS` names.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trimtab.program.counting import GateUse
from trimtab.program.joint_gate import Condition, JointGate
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime.passes import IntArray, PassLog
from trimtab.runtime.step_plan import COLUMNS

KEPT_REPORTS = 4096  # owners of requests that are gone; the oldest are forgotten first
MOST_LABELS = 4096  # names in totals: any number of them can be registered, one after the other

# Labels of totals for all that has none of its own. No name that can be registered has parentheses.
INLINE, OTHERS = "(inline)", "(others)"

Spans = Sequence[Sequence[tuple[Condition, bool]]]
"""The gates of each span in the order of their lanes, and of each whether it is decided on this rank."""

Sums = npt.NDArray[np.float64]  # [COLUMNS, 2 * G, 4]: tokens, sum of factors, factors above one half, times lowered;
# of the factor in each lane, and then of what each joined lane's is by itself


class _Named(NamedTuple):
    """What reports say of a gate: nothing that holds its probe in memory."""

    gate: str  # hex digest
    probe: str  # its registered name, or the first digits of its digest
    label: str  # in totals
    within: str  # hex digest of the gate of several that it is a member of; "" for none


class GateMeters:
    """Adds up the factors `values` [G, T] of forward passes, and what joined ones are by themselves, `owns` [G, T].

    Each slot with gates has a meter while it is in use.
    """

    def __init__(self, values: Tensor, owns: Tensor, max_requests: int) -> None:
        self._log = PassLog(values, owns)
        self._lanes = len(values)
        self._most = max_requests
        self._sums = np.zeros((1 + 3 * max_requests, COLUMNS, 2 * len(values), 4))  # by meter; 0 takes the rest
        self._free = list(range(len(self._sums) - 1, 0, -1))
        self._owner: dict[int, tuple[str, _Names]] = {}
        self._meter_of = np.zeros(max_requests + 1, np.int64)  # by slot
        self._last: IntArray | None = None  # where each token of the last pass counts, None where it had no gates
        self._parts = 1  # to be kept of it: the factors, and where there are gates of several what members did too
        self._expected = False  # whether that pass is still to be kept
        self._kept = self._folded = 0  # passes
        self._closing: deque[tuple[int, int]] = deque()  # (the last pass that counts, meter)
        self._finished: OrderedDict[str, dict[_Named, Sums]] = OrderedDict()
        self._totals: dict[str, Sums] = {}  # of finished requests, by label

    def open(self, slot: int, owner: str, gates: Spans, lowered: Sequence[ResolvedGate] = ()) -> None:
        """Measure what `gates` do to the request of `slot`. Requests of one `owner` are reported together.

        Of those that are `lowered` to probes of its row nothing is seen here; reports say how often that was so.
        """
        if not self._free:
            self._free = list(range(2 * len(self._sums) - 1, len(self._sums) - 1, -1))
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        meter = self._free.pop()
        names = [_names_of(some, self._lanes) for some in gates]
        self._owner[meter] = owner, (*names, tuple(_named(gate) for gate in lowered))
        self._meter_of[slot] = meter

    def close(self, slot: int) -> None:
        """The request of `slot` has gone; what is under way for it still counts. One without a meter is no error."""
        if not (meter := int(self._meter_of[slot])):
            return
        self._closing.append((self._kept + self._expected, meter))
        self._meter_of[slot] = 0
        self._finish()

    def expect(self, slots: IntArray, counts: IntArray, *, joined: bool) -> None:
        """The next forward pass evaluates the gates of `slots` [B] on `counts` [B, COLUMNS] tokens; `joined` says
        whether there are gates of several among them."""
        places = self._meter_of[slots, None] * COLUMNS + np.arange(COLUMNS)
        self._last = np.repeat(places.reshape(-1), counts.reshape(-1))
        self._parts = 2 if joined else 1
        self._expected = True

    def expect_again(self) -> None:
        """The next forward pass is like the last one, of the same requests."""
        self._expected = self._last is not None

    def expect_none(self) -> None:
        """The next forward pass evaluates no gate."""
        self._last = None

    def collect(self) -> None:
        """To be called before another pass runs, whoever runs it: keeps what the last one decided."""
        if self._expected and self._last is not None:
            self._log.keep(self._last, self._parts)
            self._kept += 1
            self._expected = False
        if self._closing and len(self._free) <= self._most:
            self._log.send()  # a meter is free again when its last pass has arrived
        self._fold(wait=False)

    def report(self, owner: str) -> tuple[GateUse, ...]:
        """What each gate of the requests of `owner` has done so far; waits for the pass under way."""
        self.settle()
        sums = dict(self._finished.get(owner, {}))
        for names, running in ((names, self._sums[m]) for m, (whose, names) in self._owner.items() if whose == owner):
            for named, part in _each(names, running):
                sums[named] = sums.get(named, 0.0) + part
        uses = [replace(_use(named.probe, part), gate=named.gate, within=named.within) for named, part in sums.items()]
        return tuple(sorted(uses, key=lambda use: use.key))

    def settle(self) -> None:
        """Count everything that has been launched, waiting for it."""
        self.collect()
        self._log.send()
        self._fold(wait=True)

    def totals(self) -> tuple[GateUse, ...]:
        """What was done since start, by label: a probe's name, or one for all without; waits for the pass under way."""
        self.settle()
        totals = self._totals.copy()
        for meter, (_, names) in self._owner.items():
            for named, part in _each(names, self._sums[meter]):
                _count(totals, named.label, part)
        return tuple(_use(label, sums) for label, sums in sorted(totals.items()))

    def state(self) -> bytes:
        """For whom each slot is measured, for digests. Not by which meter, nor how far counting has come: that depends
        on when the device was done, and on who asked."""
        meters = enumerate(self._meter_of.tolist())
        return repr([(slot, self._owner[meter][0]) for slot, meter in meters if meter]).encode()

    def _fold(self, *, wait: bool) -> None:
        for passes, keys, parts in self._log.arrived(wait=wait):
            places = self._sums.reshape(-1, *self._sums.shape[2:])
            tokens = np.bincount(keys)
            places[: len(tokens), :, 0] += tokens[:, None]
            for line, column in enumerate(column for factors in parts for column in factors.T):
                places[: len(tokens), line, 1] += np.bincount(keys, column)
                places[: len(tokens), line, 2] += np.bincount(keys, column > 0.5)
            self._folded += passes
            self._finish()

    def _finish(self) -> None:
        while self._closing and self._closing[0][0] <= self._folded:
            _, meter = self._closing.popleft()
            owner, names = self._owner.pop(meter)
            sums = self._sums[meter].copy()
            self._sums[meter] = 0.0
            self._free.append(meter)
            finished = self._finished.setdefault(owner, {})
            for named, part in _each(names, sums):
                _count(self._totals, named.label, part)
                finished[named] = finished.get(named, 0.0) + part
            self._finished.move_to_end(owner)
            if len(self._finished) > KEPT_REPORTS:
                self._finished.popitem(last=False)


_Names = tuple[tuple[_Named | None, ...], ...]  # of each span by place, and of gates that are lowered
_LOWERED_ONCE = np.array([0.0, 0.0, 0.0, 1.0])


def _names_of(gates: Sequence[tuple[Condition, bool]], lanes: int) -> tuple[_Named | None, ...]:
    """Whose numbers stand in each line of the sums of one span: [2 * lanes]. A joint gate's own are in the last of its
    lanes; what its members are by themselves is in the first one's factor, and in the second half for all others."""
    names: list[_Named | None] = [None] * (2 * lanes)
    taken = 0
    for gate, here in gates:
        first, taken = taken, taken + len(gate.members)
        if not here:
            continue
        names[taken - 1] = _named(gate)
        for place, member in enumerate(gate.members if isinstance(gate, JointGate) else (), first):
            names[place if place == first else lanes + place] = _named(member, within=gate.digest.hex())
    return tuple(names)


def _named(gate: Condition, within: str = "") -> _Named:
    return _Named(gate.digest.hex(), gate.name, gate.label or INLINE, within)


def _each(names: _Names, sums: Sums) -> Iterator[tuple[_Named, Sums]]:
    for phase, some in enumerate(names):
        for place, named in enumerate(some):
            if named is not None:
                yield named, (sums[phase, place] if phase < len(sums) else _LOWERED_ONCE).copy()


def _count(totals: dict[str, Sums], label: str, sums: Sums) -> None:
    if label not in totals and len(totals) >= MOST_LABELS:
        label = OTHERS
    totals[label] = totals.get(label, 0.0) + sums


def _use(probe: str, sums: Sums) -> GateUse:
    tokens, total, above, lowered = sums.tolist()
    return GateUse(probe, "", int(tokens), total / tokens if tokens else 0.0, int(above), int(lowered))
