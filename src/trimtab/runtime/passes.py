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

from trimtab.runtime.upload import Staging

MOST_PASSES = 32  # on the device at one time

IntArray = npt.NDArray[np.int64]


class Arrived(NamedTuple):
    """What some passes left behind for N tokens, with what each token was said to be."""

    passes: int
    keys: IntArray  # [N]
    parts: tuple[npt.NDArray[np.float32], ...]  # that were kept, each [N, G]; to be read before the next is asked for


class _Sent(NamedTuple):
    """A log on its way."""

    event: "torch.cuda.Event | None"
    staged: Staging  # [parts, T, G]
    parts: int  # that were kept
    passes: list[IntArray]

    def has_arrived(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]


class PassLog:
    """Keeps the first tokens of `parts`, each [G, T] float32, of every pass until they are read."""

    def __init__(self, *parts: Tensor) -> None:
        self._parts, self._on_gpu = [part.T for part in parts], parts[0].is_cuda
        self._shape = (len(parts), *self._parts[0].shape)
        self._device = parts[0].device
        self._logs = list(torch.zeros(self._shape, dtype=torch.float32, device=self._device))
        self._end = 0  # tokens that it holds
        self._used = 1  # parts that it holds of any pass
        self._passes: list[IntArray] = []  # what it holds, by pass
        self._sent: deque[_Sent] = deque()
        self._staging: list[Staging] = []  # not under way

    def keep(self, keys: IntArray, parts: int = 1) -> None:
        """Copy what the pass that has just been launched leaves behind for its first tokens, one for each of `keys`: of
        the first `parts`; what arrives of the others is whatever there was."""
        tokens = len(keys)
        if self._end + tokens > self._shape[1] or len(self._passes) == MOST_PASSES:
            self.send()
        for part in range(parts):
            self._logs[part][self._end : self._end + tokens].copy_(self._parts[part][:tokens])
        self._end += tokens
        self._used = max(self._used, parts)
        self._passes.append(keys)

    def send(self) -> None:
        """Let what is kept go to the host."""
        if not self._passes:
            return
        staged = self._staging.pop() if self._staging else self._new_staging()
        for part in range(self._used):
            log = self._logs[part][: self._end]
            staged.tensor[part, : self._end].copy_(log, non_blocking=self._on_gpu)
        event = None
        if self._on_gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._sent.append(_Sent(event, staged, self._used, self._passes))
        self._end, self._used, self._passes = 0, 1, []

    def arrived(self, *, wait: bool) -> Iterator[Arrived]:
        """What was sent and has arrived, or with `wait` all of it."""
        while self._sent and (wait or self._sent[0].has_arrived()):
            event, staged, parts, passes = self._sent.popleft()
            if event is not None:
                event.synchronize()
            keys = np.concatenate(passes)
            yield Arrived(len(passes), keys, tuple(staged.array[:parts, : len(keys)]))
            self._staging.append(staged)

    def _new_staging(self) -> Staging:
        with torch.inference_mode(False):  # steps run in it, reports do not: both write here
            tensor = torch.empty(self._shape, dtype=torch.float32, pin_memory=self._on_gpu)
        return Staging(tensor, tensor.numpy())
