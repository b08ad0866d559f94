"""What gates did: tokens evaluated, mean factor, and how many exceeded one half, per request and per probe.

How factors come off the device, and what is kept of requests that are gone, says `token_meters`. Totals have
`MOST_LABELS` names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trimtab.program.counting import INLINE, MOST_LABELS, OTHERS, GateUse
from trimtab.program.joint_gate import Condition, JointGate
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime.passes import PassLog
from trimtab.runtime.step_plan import IntArray
from trimtab.runtime.token_meters import Sums, TokenMeters, Values

GatesOfPrograms = Sequence[Sequence[tuple[Condition, bool]]]
"""The gates of each program in the order of their lanes, and of each whether it is decided on this rank."""


class _Named(NamedTuple):
    """What reports say of a gate: nothing that holds its probe in memory."""

    gate: str  # hex digest
    probe: str  # its registered name, or the first digits of its digest
    label: str  # in totals
    within: str  # hex digest of the gate of several that it is a member of; "" for none


_FACTORS, _ABOVE_HALF, _LOWERED = 1, 2, 3  # what is added up; no pass computes the last
_LOWERED_ONCE = np.eye(1 + _LOWERED)[_LOWERED]


class GateMeters(TokenMeters[_Named]):
    """Adds up the factors `values` [G, T] of forward passes, and what joined ones are by themselves, `owns` [G, T]."""

    def __init__(self, values: Tensor, owns: Tensor, max_requests: int, decided: Tensor | None = None) -> None:
        self._lanes, tokens = values.shape
        log = PassLog(tokens, 2 * self._lanes, values.device, decides=decided is not None)
        super().__init__(log, max_requests, places=2 * self._lanes, numbers=_LOWERED, decided=decided)
        self._values, self._owns = values.T, owns.T
        self._joined = False  # whether there are gates of several in the last pass
        self._totals: dict[str, Sums] = {}  # of finished requests, by label

    def open_gates(
        self,
        slot: int,
        owner: str,
        gates: GatesOfPrograms,
        lowered: Sequence[ResolvedGate] = (),
        *,
        decided: bool = False,
    ) -> None:
        """Measure what `gates` do to the request of `slot`. Requests of one `owner` are reported together.

        Of those that are `lowered` to probes of its rows nothing is seen here; reports say how often that was so.
        `decided`: the device decides which program's are a token's.
        """
        programs = [_names_of(some, self._lanes) for some in gates]
        self.open(slot, owner, programs, [(_named(gate), _LOWERED_ONCE) for gate in lowered], decided=decided)

    def report(self, owner: str) -> tuple[GateUse, ...]:
        """What each gate of the requests of `owner` has done so far; waits for the pass under way."""
        sums = self.sums(owner)
        uses = [replace(_use(named.probe, part), gate=named.gate, within=named.within) for named, part in sums.items()]
        return tuple(sorted(uses, key=lambda use: use.key))

    def expect_gates(self, slots: IntArray, counts: IntArray, *, joined: bool) -> None:
        """The next forward pass evaluates the gates of `slots` [B] on `counts` [B, COLUMNS] tokens; `joined` says
        whether there are gates of several among them."""
        self._joined = joined
        self.expect(slots, counts)

    def totals(self) -> tuple[GateUse, ...]:
        """What was done since start, by label: a probe's name, or one for all without; waits for the pass under way."""
        self.settle()
        totals = self._totals.copy()
        for meter in self._owner:
            for named, part in self._each(meter):
                _count(totals, named.label, part)
        return tuple(_use(label, sums) for label, sums in sorted(totals.items()))

    def _keep(self, keys: IntArray) -> None:
        tokens = len(keys)
        parts = [self._values[:tokens], *([self._owns[:tokens]] if self._joined else [])]
        self._log.keep(keys, *parts, decided=self._decided_of(tokens))

    def _columns(self, values: Values) -> Iterator[tuple[int, int, Values]]:
        for line, factors in enumerate(values.T):
            yield line, _FACTORS, factors
            yield line, _ABOVE_HALF, (factors > 0.5).astype(np.float32)

    def _forgotten(self, name: _Named, sums: Sums) -> None:
        _count(self._totals, name.label, sums)


def _names_of(gates: Sequence[tuple[Condition, bool]], lanes: int) -> tuple[_Named | None, ...]:
    """Whose numbers stand at each place of the sums of one program: [2 * lanes].

    A joint gate's own are in the last of its lanes; what its members are by themselves is in the first one's factor,
    and in the second half for all others.
    """
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


def _count(totals: dict[str, Sums], label: str, sums: Sums) -> None:
    if label not in totals and len(totals) >= MOST_LABELS:
        label = OTHERS
    totals[label] = totals.get(label, 0.0) + sums


def _use(probe: str, sums: Sums) -> GateUse:
    tokens, total, above, lowered = sums.tolist()
    return GateUse(probe, "", int(tokens), total / tokens if tokens else 0.0, int(above), int(lowered))
