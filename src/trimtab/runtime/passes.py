"""What forward passes leave behind on the device, on its way to the host.

Behind each pass it is copied once, to the end of a log on the device. The log goes to the host when it is full, after
`MOST_PASSES`, or when somebody asks, in one copy that is seen to have arrived without waiting for it. So a pass costs
the host one launch, and what comes of many is read at once.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.runtime.step_plan import IntArray
from trimtab.runtime.upload import Staging

MOST_PASSES = 32  # on the device at one time


class Arrived(NamedTuple):
    """What some passes left behind for N tokens, with what each token was said to be."""

    passes: int
    keys: IntArray  # [N]
    values: npt.NDArray[np.float32]  # [N, V]; to be read before the next is asked for
    decided: npt.NDArray[np.float32]  # [N], or [0] where the log has no place for it; likewise


class _Sent(NamedTuple):
    """A log on its way."""

    event: "torch.cuda.Event | None"
    staged: Staging
    used: int
    keys: list[IntArray]
    passes: int

    def has_arrived(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]


class PassLog:
    """Keeps some numbers, at most `width` of each token, of every pass until they are read.

    Where the device decides which program a token receives, it also keeps that: `decides` says whether it may.
    """

    def __init__(self, tokens: int, width: int, device: torch.device, *, decides: bool = False) -> None:
        self._on_gpu = device.type == "cuda"
        self._decides = decides
        self._log = _new_log(tokens, width + decides, device)
        self._end = 0  # tokens that it holds
        self._used = 0  # numbers of a token, of any pass that it holds
        self._passes: list[IntArray] = []  # what it holds, by call of `keep`
        self._count = 0  # passes
        self._sent: deque[_Sent] = deque()
        self._staging: list[Staging] = []  # not under way

    def widen(self, width: int) -> None:
        """Make room for so many numbers of each token."""
        if (width := width + self._decides) > self._log.shape[1]:
            self.send()
            self._log = _new_log(len(self._log), width, self._log.device)
            self._staging.clear()

    def keep(self, keys: IntArray, *parts: Tensor, decided: Tensor | None = None, passes: int = 1) -> None:
        """Copy what the pass that has just been launched leaves behind for N tokens, one for each of `keys`: `parts`,
        each [N, V], side by side, and which program was `decided` for each [N]. What arrives behind them is whatever
        there was. It may be what several `passes` have left."""
        tokens = len(keys)
        if self._end + tokens > len(self._log) or len(self._passes) == MOST_PASSES:
            self.send()
        start = 0
        for part in parts:
            self._log[self._end : self._end + tokens, start : start + part.shape[1]].copy_(part)
            start += part.shape[1]
        if decided is not None:
            self._log[self._end : self._end + tokens, -1].copy_(decided)
        self._used = max(self._used, start)
        self._end += tokens
        self._passes.append(keys)
        self._count += passes

    def send(self) -> None:
        """Let what is kept go to the host."""
        if not self._passes:
            return
        staged = self._staging.pop() if self._staging else self._new_staging()
        staged.tensor[: self._end].copy_(self._log[: self._end], non_blocking=self._on_gpu)
        event = None
        if self._on_gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._log.device))
        self._sent.append(_Sent(event, staged, self._used, self._passes, self._count))
        self._end, self._used, self._passes, self._count = 0, 0, [], 0

    def arrived(self, *, wait: bool) -> Iterator[Arrived]:
        """What was sent and has arrived, or with `wait` all of it."""
        while self._sent and (wait or self._sent[0].has_arrived()):
            event, staged, used, parts, passes = self._sent.popleft()
            if event is not None:
                event.synchronize()
            keys = np.concatenate(parts)
            numbers = staged.array[: len(keys)]
            yield Arrived(passes, keys, numbers[:, :used], numbers[:, -1] if self._decides else numbers[:0, 0])
            if staged.tensor.shape == self._log.shape:
                self._staging.append(staged)

    def _new_staging(self) -> Staging:
        with torch.inference_mode(False):  # steps run in it, reports do not: both write here
            tensor = torch.empty(self._log.shape, dtype=torch.float32, pin_memory=self._on_gpu)
        return Staging(tensor, tensor.numpy())


def _new_log(tokens: int, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # made in a step, perhaps, and written to by reports
        return torch.zeros(tokens, width, dtype=torch.float32, device=device)
