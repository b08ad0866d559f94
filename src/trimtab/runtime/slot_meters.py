"""What slots did: how many corrections were measured, how large they were, and how many moved a token, per request.

A slot is told of by phase and digest: what a request calls it, its program does not know.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from trimtab.ops.buffers import SteeringBuffers
from trimtab.ops.slot_buffers import SlotBuffers
from trimtab.ops.slot_uses import slot_uses
from trimtab.program import ResolvedSteering
from trimtab.program.counting import SlotUse
from trimtab.program.slots import Slot, measured_slots
from trimtab.runtime.passes import MOST_PASSES, PassLog
from trimtab.runtime.step_plan import IntArray
from trimtab.runtime.token_meters import TokenMeters, Values
from trimtab.sites import Phase


class _Named(NamedTuple):
    """What reports say of a slot."""

    phase: str
    slot: str  # hex digest
    begins: str  # the first of the sites at which it acts here
    sites: int


_TOTAL, _MOVED = 1, 2  # what is added up


class SlotMeters(TokenMeters[_Named]):
    """Adds up the corrections of forward passes.

    Those of a pass, and the rows of its tokens, are copied behind it: two launches. They are summed over sites for many
    passes at once, before any record of a row changes.
    """

    def __init__(self, buffers: SteeringBuffers, slots: SlotBuffers, max_requests: int) -> None:
        places, token_rows = slots.form.count, buffers.index
        decided = None if buffers.spans is None else buffers.spans.decided
        log = PassLog(len(token_rows), _MOVED * places, token_rows.device, decides=decided is not None)
        super().__init__(log, max_requests, places=places, numbers=_MOVED, decided=decided)
        self._slots, self._token_rows = slots, token_rows
        self._cells, self._rows = torch.empty_like(slots.corrections), torch.empty_like(token_rows)
        self._received = None if decided is None else torch.empty_like(decided)
        self._held: list[IntArray] = []  # the keys of passes that are to be summed
        self._end = 0  # their tokens
        self._sites = frozenset(slots.sites)
        self._places = places  # as many as any request has had

    def open_slots(self, slot: int, owner: str, steering: ResolvedSteering) -> None:
        """Measure what the slots of each program do to the request of `slot`, which may have none."""
        each = zip(steering.phases, steering.programs, strict=True)
        programs = [self._names(phase, program.slots) for phase, program in each]
        if any(programs):
            self.open(slot, owner, programs, decided=steering.spans is not None)
            self._places = max(self._places, *map(len, programs))
            self._log.widen(_MOVED * self._places)

    def expect_of(self, slots: IntArray, counts: IntArray) -> None:
        """The next forward pass is over `slots` [B], some of which may be measured, of `counts` [B, COLUMNS] tokens."""
        if self._meter_of[slots].any():
            self.expect(slots, counts)
        else:
            self.expect_none()

    def report(self, owner: str) -> tuple[SlotUse, ...]:
        """What each slot of the requests of `owner` has done so far at the sites of this rank; waits for the pass under
        way."""
        return tuple(
            SlotUse(named.phase, named.slot, named.begins, int(tokens) * named.sites, float(total), int(moved))
            for named, (tokens, total, moved) in sorted(self.sums(owner).items())
        )

    def sum_up(self) -> None:
        """Sum over sites what is held of passes. To be called before records of rows change."""
        if self._held:
            values = slot_uses(self._slots.places, self._cells[..., : self._end], self._rows[: self._end], self._places)
            received = None if self._received is None else self._received[: self._end]
            self._log.keep(np.concatenate(self._held), values, decided=received, passes=len(self._held))
            self._held, self._end = [], 0

    def _keep(self, keys: IntArray) -> None:
        end = self._end + len(keys)
        if end > len(self._rows) or len(self._held) == MOST_PASSES:
            self.sum_up()
            end = len(keys)
        here = slice(self._end, end)
        self._cells[..., here].copy_(self._slots.corrections[..., : len(keys)])
        self._rows[here].copy_(self._token_rows[: len(keys)])
        if self._received is not None and (decided := self._decided_of(len(keys))) is not None:
            self._received[here].copy_(decided)
        self._held.append(keys)
        self._end = end

    def _send(self) -> None:
        self.sum_up()
        super()._send()

    def _columns(self, values: Values) -> Iterator[tuple[int, int, Values]]:
        for column, numbers in enumerate(values.T):
            place, number = divmod(column, _MOVED)
            yield place, _TOTAL + number, numbers

    def _names(self, phase: Phase, slots: Sequence[Slot]) -> list[_Named | None]:
        names: list[_Named | None] = []
        for slot in measured_slots(slots):
            here = [site for site in slot.sites if site in self._sites]
            names.append(_Named(str(phase), slot.digest.hex(), str(here[0]), len(here)) if here else None)
        return names
