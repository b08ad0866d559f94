"""What gates did: tokens evaluated, mean factor, and how many exceeded one half, per request and per probe.

The factors of a forward pass are copied to the host behind it, in stream order, and read once the copy has finished,
which is seen without waiting: a step or two later on a GPU. `report` and `totals` wait, and are called between steps.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.gates import ResolvedGate
from trimtab.runtime.upload import Staging

KEPT_REPORTS = 4096  # of requests that are gone; the oldest are forgotten first

Phases = tuple[tuple[ResolvedGate | None, ...], ...]
"""The gates of (prefill, decode), None where another rank evaluates it."""

IntArray = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]  # [2, G, 3]: tokens, sum of factors, factors above one half


@dataclass(frozen=True)
class GateUse:
    """What one gate did. `tokens` counts evaluations: a token computed twice, after a preemption, counts twice, and one
    found in a prefix cache not at all."""

    probe: str  # its registered name, or the first digits of its digest
    gate: str  # hex digest of the gate; "" in a sum over all gates of a probe
    tokens: int
    mean: float  # of the factor; 0 without tokens
    above_half: int  # tokens whose factor exceeded one half

    def __add__(self, other: "GateUse") -> "GateUse":
        tokens = self.tokens + other.tokens
        mean = (self.mean * self.tokens + other.mean * other.tokens) / tokens if tokens else 0.0
        return GateUse(self.probe, self.gate, tokens, mean, self.above_half + other.above_half)


@dataclass(frozen=True)
class _Pass:
    """The factors of one forward pass on their way to the host, and whose they are."""

    arrived: "torch.cuda.Event | None"
    staged: Staging  # [G * tokens] float32
    meters: IntArray  # [B]
    counts: IntArray  # [B, 2]: tokens per request and phase

    def has_arrived(self) -> bool:
        return self.arrived is None or bool(self.arrived.query())  # type: ignore[no-untyped-call]


class GateMeters:
    """Adds up the factors `values` [G, T] of forward passes. Each slot with gates has a meter while it is in use."""

    def __init__(self, values: Tensor, max_requests: int) -> None:
        self._values = values
        self._on_gpu = values.is_cuda
        self._sums = np.zeros((1 + 2 * max_requests, 2, values.shape[0], 3))  # by meter; 0 takes what is not measured
        self._free = list(range(len(self._sums) - 1, 0, -1))
        self._owner: dict[int, tuple[str, Phases]] = {}
        self._meter_of = np.zeros(max_requests + 1, np.int64)  # by slot
        self._expected: tuple[IntArray, IntArray] | None = None
        self._passes: deque[_Pass] = deque()
        self._sent = self._folded = 0  # passes
        self._closing: deque[tuple[int, int]] = deque()  # (the last pass that counts, meter)
        self._staging: list[Staging] = []
        self._finished: OrderedDict[str, list[tuple[Phases, Sums]]] = OrderedDict()
        self._totals: dict[str, Sums] = {}  # of finished requests, [3]

    def open(self, slot: int, request_id: str, gates: Phases) -> None:
        """Measure what `gates` do to the request of `slot`."""
        if not self._free:
            self._free = list(range(2 * len(self._sums) - 1, len(self._sums) - 1, -1))
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        meter = self._free.pop()
        self._owner[meter] = request_id, gates
        self._meter_of[slot] = meter

    def close(self, slot: int) -> None:
        """The request of `slot` has gone; what is under way for it still counts."""
        self._closing.append((self._sent + (self._expected is not None), int(self._meter_of[slot])))
        self._meter_of[slot] = 0
        self._finish()

    def expect(self, slots: IntArray, counts: IntArray) -> None:
        """The next forward pass evaluates the gates of `slots` [B] on `counts` [B, 2] tokens."""
        self._expected = self._meter_of[slots], counts.copy()

    def collect(self) -> None:
        """To be called before the gates of another pass are written: fetches what the last one decided."""
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

    def report(self, *request_ids: str) -> tuple[GateUse, ...]:
        """What each gate of these requests together has done so far; waits for the pass under way."""
        self.settle()
        running = [(gates, self._sums[m]) for m, (owner, gates) in self._owner.items() if owner in request_ids]
        finished = [part for request_id in request_ids for part in self._finished.get(request_id, ())]
        by_gate: dict[bytes, tuple[ResolvedGate, Sums]] = {}
        for gate, sums in _each([*finished, *running]):
            by_gate[gate.digest] = gate, (by_gate[gate.digest][1] + sums if gate.digest in by_gate else sums)
        return tuple(_use(gate.name, gate.digest.hex(), sums) for _, (gate, sums) in sorted(by_gate.items()))

    def settle(self) -> None:
        """Count everything that has been launched, waiting for it."""
        self.collect()
        while self._passes:
            first = self._passes.popleft()
            if first.arrived is not None:
                first.arrived.synchronize()
            self._fold(first)

    @property
    def known(self) -> set[str]:
        """The requests that `report` knows of."""
        return {owner for owner, _ in self._owner.values()} | self._finished.keys()

    def totals(self) -> tuple[GateUse, ...]:
        """What was done since start per probe, by name; waits for the pass under way."""
        self.settle()
        totals = dict(self._totals)
        for gate, sums in _each((gates, self._sums[meter]) for meter, (_, gates) in self._owner.items()):
            totals[gate.name] = totals.get(gate.name, 0.0) + sums
        return tuple(_use(name, "", sums) for name, sums in sorted(totals.items()))

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
            sums = np.empty((len(kept), gates, 3))
            sums[..., 0], sums[..., 1], sums[..., 2] = counts[kept, None], factors.T, above.T
            # A request is in a batch once, so no meter but 0 is named twice.
            self._sums[done.meters[kept // 2], kept % 2] += sums
        self._staging.append(done.staged)
        self._folded += 1
        self._finish()

    def _finish(self) -> None:
        while self._closing and self._closing[0][0] <= self._folded:
            _, meter = self._closing.popleft()
            request_id, gates = self._owner.pop(meter)
            sums = self._sums[meter].copy()
            self._sums[meter] = 0.0
            self._free.append(meter)
            for gate, part in _each([(gates, sums)]):
                self._totals[gate.name] = self._totals.get(gate.name, 0.0) + part
            self._finished.setdefault(request_id, []).append((gates, sums))
            self._finished.move_to_end(request_id)
            if len(self._finished) > KEPT_REPORTS:
                self._finished.popitem(last=False)


def _each(parts: Iterable[tuple[Phases, Sums]]) -> Iterable[tuple[ResolvedGate, Sums]]:
    for gates, sums in parts:
        for phase, some in enumerate(gates):
            for place, gate in enumerate(some):
                if gate is not None:
                    yield gate, sums[phase, place]


def _use(probe: str, gate: str, sums: Sums) -> GateUse:
    tokens, total, above = sums.tolist()
    return GateUse(probe, gate, int(tokens), total / tokens if tokens else 0.0, int(above))
