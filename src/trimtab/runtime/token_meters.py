"""Numbers that a forward pass leaves for each of its tokens, added up per request: for reports, never in the way.

The numbers of each pass are kept behind it, and added up once they have reached the host (`runtime.passes`): passes
later, many at a time. `settle`, and all that reports, waits, and is called between steps.

A token has places numbered from 0, such as its gates; what stands at them is told by the names that a request was
opened with, for each of its programs. Each program has a line of sums. Which line a token counts to is known when its
pass is planned, or, where the device decides, comes back from there with the numbers. What is kept of requests that are
gone is bounded: the last `KEPT_REPORTS` owners, of each only names and sums.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trimtab.program.spans import MOST_PROGRAMS
from trimtab.runtime.passes import Arrived, PassLog
from trimtab.runtime.step_plan import COLUMNS, IntArray

KEPT_REPORTS = 4096  # owners of requests that are gone; the oldest are forgotten first

Name = TypeVar("Name")
Values = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]  # [1 + W]: tokens, then each number of a place


class TokenMeters(Generic[Name]):
    """Adds up numbers of tokens. Each slot of the planner in use that is measured has a meter.

    Whoever inherits keeps what a pass leaves behind (`_keep`), and says what is added up of it (`_columns`).
    """

    def __init__(
        self, log: PassLog, max_requests: int, *, places: int, numbers: int, decided: Tensor | None = None
    ) -> None:
        """`places` that most requests have at most, `numbers` W of each place; `decided` [T] is where the device says
        which program a token received, None where it never decides."""
        self._log = log
        self._most = COLUMNS * max_requests
        self._sums = np.zeros((COLUMNS * (1 + 3 * max_requests), places, 1 + numbers))  # the first lines take the rest
        self._free = list(range(len(self._sums) - 1, COLUMNS - 1, -1))
        self._lines: dict[int, list[int]] = {}  # by meter, which is the first of them: one for each program
        self._owner: dict[int, tuple[str, tuple[tuple[Name | None, ...], ...]]] = {}
        self._noted: dict[int, Sequence[tuple[Name, Sums]]] = {}
        self._meter_of = np.zeros(max_requests + 1, np.int64)  # by slot
        self._keys = np.tile(np.arange(COLUMNS), (max_requests + 1, 1))  # by slot and phase: the line, or -meter
        self._decided = decided
        self._lines_of = np.zeros((0, MOST_PROGRAMS), np.int64)  # by meter, of those whose tokens the device decides
        self._deciding = False  # whether there are such in the last pass
        self._last: IntArray | None = None  # where each token of the last pass counts, None where none was measured
        self._expected = False  # whether that pass is still to be kept
        self._kept = self._folded = 0  # passes
        self._closing: deque[tuple[int, int]] = deque()  # (the last pass that counts, meter)
        self._finished: OrderedDict[str, dict[Name, Sums]] = OrderedDict()

    def open(
        self,
        slot: int,
        owner: str,
        programs: Sequence[Sequence[Name | None]],
        noted: Sequence[tuple[Name, Sums]] = (),
        *,
        decided: bool = False,
    ) -> None:
        """Measure the request of `slot`: place p of program s has the name `programs[s][p]`, None if it is not told of.

        There is a program for each phase, or the device has `decided` which one a token received. Requests of one
        `owner` are reported together, names that are equal added. `noted` is reported as it is.
        """
        while len(self._free) < len(programs):
            self._free[:0] = range(2 * len(self._sums) - 1, len(self._sums) - 1, -1)
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        if (more := max(map(len, programs)) - self._sums.shape[1]) > 0:
            self._sums = np.pad(self._sums, ((0, 0), (0, more), (0, 0)))
        lines = [self._free.pop() for _ in programs]
        meter = lines[0]
        self._lines[meter] = lines
        self._owner[meter] = owner, tuple(map(tuple, programs))
        self._noted[meter] = noted
        self._meter_of[slot] = meter
        self._keys[slot] = -meter if decided else lines
        if decided:
            if (more := len(self._sums) - len(self._lines_of)) > 0:
                self._lines_of = np.pad(self._lines_of, ((0, more), (0, 0)))
            self._lines_of[meter, : len(lines)] = lines

    def close(self, slot: int) -> None:
        """The request of `slot` has gone; what is under way for it still counts. One without a meter is no error."""
        if not (meter := int(self._meter_of[slot])):
            return
        self._closing.append((self._kept + self._expected, meter))
        self._meter_of[slot] = 0
        self._keys[slot] = range(COLUMNS)
        self._finish()

    def expect(self, slots: IntArray, counts: IntArray) -> None:
        """The next forward pass computes what is measured of `slots` [B], on `counts` [B, COLUMNS] tokens."""
        keys = self._keys[slots]
        self._deciding = self._decided is not None and bool((keys < 0).any())
        self._last = np.repeat(keys.reshape(-1), counts.reshape(-1))
        self._expected = True

    def expect_again(self) -> None:
        """The next forward pass is like the last one, of the same requests."""
        self._expected = self._last is not None

    def expect_none(self) -> None:
        """The next forward pass computes nothing that is measured."""
        self._last = None

    def collect(self) -> None:
        """To be called before another pass runs, whoever runs it: keeps what the last one left behind."""
        if self._expected and self._last is not None:
            self._keep(self._last)
            self._kept += 1
            self._expected = False
        if self._closing and len(self._free) <= self._most:
            self._send()  # a meter is free again when its last pass has arrived
        self._fold(wait=False)

    def settle(self) -> None:
        """Count everything that has been launched, waiting for it."""
        self.collect()
        self._send()
        self._fold(wait=True)

    def sums(self, owner: str) -> dict[Name, Sums]:
        """What has been added up for the requests of `owner` so far; waits for the pass under way."""
        self.settle()
        sums = dict(self._finished.get(owner, {}))
        for meter, (whose, _) in self._owner.items():
            if whose == owner:
                for name, part in self._each(meter):
                    sums[name] = sums.get(name, 0.0) + part
        return sums

    def state(self) -> bytes:
        """For whom each slot is measured, for digests. Not by which meter, nor how far counting has come: that depends
        on when the device was done, and on who asked."""
        meters = enumerate(self._meter_of.tolist())
        return repr([(slot, self._owner[meter][0]) for slot, meter in meters if meter]).encode()

    def _keep(self, keys: IntArray) -> None:
        """Keep what the last pass has left of its first tokens, one for each of `keys`. Waits for nothing."""
        raise NotImplementedError

    def _decided_of(self, tokens: int) -> Tensor | None:
        """Which program the device has decided on for the last pass's first tokens; None if for none of them."""
        return self._decided[:tokens] if self._decided is not None and self._deciding else None

    def _send(self) -> None:
        """Let all that is kept go to the host."""
        self._log.send()

    def _columns(self, values: Values) -> Iterator[tuple[int, int, Values]]:
        """Of `values` [N, V] what is added up [N], with its place, and its number among those of a place, from 1."""
        raise NotImplementedError

    def _forgotten(self, name: Name, sums: Sums) -> None:
        """The request has gone that `sums` are of."""

    def _each(self, meter: int) -> Iterator[tuple[Name, Sums]]:
        """What a meter has come to, by name."""
        for names, sums in zip(self._owner[meter][1], self._sums[self._lines[meter]], strict=True):
            for name, own in zip(names, sums, strict=False):
                if name is not None:
                    yield name, own.copy()
        yield from self._noted[meter]

    def _fold(self, *, wait: bool) -> None:
        for arrived in self._log.arrived(wait=wait):
            lines = self._lines_at(arrived)
            tokens = np.bincount(lines)
            self._sums[: len(tokens), :, 0] += tokens[:, None]
            for place, number, column in self._columns(arrived.values):
                self._sums[: len(tokens), place, number] += np.bincount(lines, column)
            self._folded += arrived.passes
            self._finish()

    def _lines_at(self, arrived: Arrived) -> IntArray:
        """Where each token counts."""
        keys = arrived.keys
        on_device = keys < 0
        if not on_device.any():
            return keys
        lines = keys.copy()
        lines[on_device] = self._lines_of[-keys[on_device], arrived.decided[on_device].astype(np.int64)]
        return lines

    def _finish(self) -> None:
        while self._closing and self._closing[0][0] <= self._folded:
            _, meter = self._closing.popleft()
            owner, _ = self._owner[meter]
            finished = self._finished.setdefault(owner, {})
            for name, part in self._each(meter):
                self._forgotten(name, part)
                finished[name] = finished.get(name, 0.0) + part
            self._finished.move_to_end(owner)
            if len(self._finished) > KEPT_REPORTS:
                self._finished.popitem(last=False)
            lines = self._lines.pop(meter)
            del self._owner[meter], self._noted[meter]
            self._sums[lines] = 0.0
            self._free += lines
