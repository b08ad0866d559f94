"""What gates did: tokens evaluated, mean factor, and how many exceeded one half, per request and per probe.

The factors of a forward pass are copied to the host behind it, in stream order, and read once the copy has finished,
which is seen without waiting: a step or two later on a GPU. `report` and `totals` wait, and are called between steps.

What is kept is bounded: of requests that are gone the last `KEPT_REPORTS` owners, of each only names and sums; in
totals `MOST_LABELS` names.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.program.counting import GateUse
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime.step_plan import COLUMNS
from trimtab.runtime.upload import Staging

KEPT_REPORTS = 4096  # owners of requests that are gone; the oldest are forgotten first
MOST_LABELS = 4096  # names in totals: any number of them can be registered, one after the other

# Labels of totals for all that has none of its own. No name that can be registered has parentheses.
INLINE, OTHERS = "(inline)", "(others)"

Phases = tuple[tuple[ResolvedGate | None, ...], ...]
"""The gates of each span, None where another rank evaluates it."""

IntArray = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]  # [COLUMNS, G, 4]: tokens, sum of factors, factors above one half, times lowered


class _Named(NamedTuple):
    """What reports say of a gate: nothing that holds its probe in memory."""

    gate: str  # hex digest
    probe: str  # its registered name, or the first digits of its digest
    label: str  # in totals


@dataclass(frozen=True)
class _Pass:
    """The factors of one forward pass on their way to the host, and whose they are."""

    arrived: "torch.cuda.Event | None"
    staged: Staging  # [G * tokens] float32
    meters: IntArray  # [B]
    counts: IntArray  # [B, COLUMNS]: tokens per request and span

    def has_arrived(self) -> bool:
        return self.arrived is None or bool(self.arrived.query())  # type: ignore[no-untyped-call]


class GateMeters:
    """Adds up the factors `values` [G, T] of forward passes. Each slot with gates has a meter while it is in use."""

    def __init__(self, values: Tensor, max_requests: int) -> None:
        self._values = values
        self._on_gpu = values.is_cuda
        self._sums = np.zeros((1 + 2 * max_requests, COLUMNS, values.shape[0], 4))  # by meter; 0 takes the rest
        self._free = list(range(len(self._sums) - 1, 0, -1))
        self._owner: dict[int, tuple[str, _Names]] = {}
        self._meter_of = np.zeros(max_requests + 1, np.int64)  # by slot
        self._expected: tuple[IntArray, IntArray] | None = None
        self._passes: deque[_Pass] = deque()
        self._sent = self._folded = 0  # passes
        self._closing: deque[tuple[int, int]] = deque()  # (the last pass that counts, meter)
        self._staging: list[Staging] = []
        self._finished: OrderedDict[str, dict[_Named, Sums]] = OrderedDict()
        self._totals: dict[str, Sums] = {}  # of finished requests, by label

    def open(self, slot: int, owner: str, gates: Phases, lowered: Sequence[ResolvedGate] = ()) -> None:
        """Measure what `gates` do to the request of `slot`. Requests of one `owner` are reported together.

        Of those that are `lowered` to probes of its row nothing is seen here; reports say how often that was so.
        """
        if not self._free:
            self._free = list(range(2 * len(self._sums) - 1, len(self._sums) - 1, -1))
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        meter = self._free.pop()
        phases = (*gates, lowered)
        self._owner[meter] = (
            owner,
            tuple(tuple(None if gate is None else _named(gate) for gate in some) for some in phases),
        )
        self._meter_of[slot] = meter

    def close(self, slot: int) -> None:
        """The request of `slot` has gone; what is under way for it still counts. One without a meter is no error."""
        if not (meter := int(self._meter_of[slot])):
            return
        self._closing.append((self._sent + (self._expected is not None), meter))
        self._meter_of[slot] = 0
        self._finish()

    def expect(self, slots: IntArray, counts: IntArray) -> None:
        """The next forward pass evaluates the gates of `slots` [B] on `counts` [B, COLUMNS] tokens."""
        self._expected = self._meter_of[slots], counts.copy()

    def collect(self) -> None:
        """To be called before another pass runs, whoever runs it: fetches what the last one decided."""
        if self._expected is not None:
            meters, counts = self._expected
            self._expected = None
            tokens = int(counts.sum())
            staged = self._staging.pop() if self._staging else self._new_staging()
            values = self._values[:, :tokens].reshape(-1)
            staged.tensor[: len(values)].copy_(values, non_blocking=self._on_gpu)
            event = None
            if self._on_gpu:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(self._values.device))
            self._passes.append(_Pass(event, staged, meters, counts))
            self._sent += 1
        while self._passes and self._passes[0].has_arrived():
            self._fold(self._passes.popleft())

    def report(self, owner: str) -> tuple[GateUse, ...]:
        """What each gate of the requests of `owner` has done so far; waits for the pass under way."""
        self.settle()
        sums = dict(self._finished.get(owner, {}))
        for names, running in ((names, self._sums[m]) for m, (whose, names) in self._owner.items() if whose == owner):
            for named, part in _each(names, running):
                sums[named] = sums.get(named, 0.0) + part
        return tuple(_use(named.probe, named.gate, part) for named, part in sorted(sums.items()))

    def settle(self) -> None:
        """Count everything that has been launched, waiting for it."""
        self.collect()
        while self._passes:
            first = self._passes.popleft()
            if first.arrived is not None:
                first.arrived.synchronize()
            self._fold(first)

    def totals(self) -> tuple[GateUse, ...]:
        """What was done since start, by label: a probe's name, or one for all without; waits for the pass under way."""
        self.settle()
        totals = self._totals.copy()
        for meter, (_, names) in self._owner.items():
            for named, part in _each(names, self._sums[meter]):
                _count(totals, named.label, part)
        return tuple(_use(label, "", sums) for label, sums in sorted(totals.items()))

    def state(self) -> bytes:
        """For whom each slot is measured, for digests. Not by which meter, nor how far counting has come: that depends
        on when the device was done, and on who asked."""
        meters = enumerate(self._meter_of.tolist())
        return repr([(slot, self._owner[meter][0]) for slot, meter in meters if meter]).encode()

    def _new_staging(self) -> Staging:
        with torch.inference_mode(False):  # steps run in it, reports do not: both write here
            tensor = torch.empty(self._values.numel(), dtype=torch.float32, pin_memory=self._on_gpu)
        return Staging(tensor, tensor.numpy())

    def _fold(self, done: _Pass) -> None:
        counts = done.counts.reshape(-1)
        kept = np.flatnonzero(counts)
        if len(kept):
            gates, tokens = self._values.shape[0], int(counts.sum())
            factors = done.staged.array[: gates * tokens].reshape(gates, tokens)
            above = factors > 0.5
            if tokens > len(kept):  # else each of them is a segment already, as in a pass that only decodes
                starts = (np.cumsum(counts) - counts)[kept]
                factors = np.add.reduceat(factors, starts, axis=1, dtype=np.float64)
                above = np.add.reduceat(above, starts, axis=1, dtype=np.int64)
            sums = np.zeros((len(kept), gates, 4))
            sums[..., 0], sums[..., 1], sums[..., 2] = counts[kept, None], factors.T, above.T
            # A request is in a batch once, so no meter but 0 is named twice.
            self._sums[done.meters[kept // COLUMNS], kept % COLUMNS] += sums
        self._staging.append(done.staged)
        self._folded += 1
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


def _named(gate: ResolvedGate) -> _Named:
    return _Named(gate.digest.hex(), gate.name, gate.label or INLINE)


def _each(names: _Names, sums: Sums) -> Iterator[tuple[_Named, Sums]]:
    for phase, some in enumerate(names):
        for place, named in enumerate(some):
            if named is not None:
                yield named, (sums[phase, place] if phase < len(sums) else _LOWERED_ONCE).copy()


def _count(totals: dict[str, Sums], label: str, sums: Sums) -> None:
    if label not in totals and len(totals) >= MOST_LABELS:
        label = OTHERS
    totals[label] = totals.get(label, 0.0) + sums


def _use(probe: str, gate: str, sums: Sums) -> GateUse:
    tokens, total, above, lowered = sums.tolist()
    return GateUse(probe, gate, int(tokens), total / tokens if tokens else 0.0, int(above), int(lowered))
