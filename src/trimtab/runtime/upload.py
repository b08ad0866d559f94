"""How host state reaches the device: staged through pinned memory, written only where it differs.

Each upload is one asynchronous copy on the current stream. The host may be a step ahead of the device, so a staging
buffer is rewritten only after the event that follows its last copy; everything on the device happens in stream order,
after the forward passes already queued and before the next one.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.runtime.step_plan import TOKEN, TOKEN_WORDS, Words

Content = TypeVar("Content")

ROW_STAGING_BYTES = 16 << 20  # a larger burst of new rows goes up in several pieces


class Staging(NamedTuple):
    """One host buffer, as torch and as NumPy see it."""

    tensor: Tensor
    array: npt.NDArray[Any]


class StagingRing:
    """Host buffers of one shape, used in turn. Pinned and event-guarded for CUDA; one plain buffer for the CPU."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, depth: int = 3) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._buffers: list[Staging] = []
        for _ in range(depth if self._pinned else 1):
            tensor = torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
            self._buffers.append(Staging(tensor, tensor.numpy()))
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._turn = 0

    def next(self) -> Staging:
        """The next buffer, safe to write: its previous copy has left it."""
        self._turn = (self._turn + 1) % len(self._buffers)
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        return self._buffers[self._turn]

    def send(self, staged: Tensor, target: Tensor) -> None:
        """Copy `staged`, a view of the buffer last taken, to `target` on the device."""
        target.copy_(staged, non_blocking=self._pinned)
        if self._pinned:
            event = self._copied[self._turn]
            if event is None:
                event = self._copied[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))


class RowUploader(Generic[Content]):
    """Writes table rows: one staged copy and one scatter over all sites for as many rows as fit the staging buffer."""

    def __init__(
        self, table: Tensor, compose: Callable[[Content], npt.NDArray[Any]], staging_bytes: int | None = None
    ) -> None:
        """`table` is [S, R, H] on the device, `compose` makes the [S, H] of a row: float32, or bytes for bytes."""
        self._table, self._compose = table, compose
        sites, max_rows, width = table.shape
        row_bytes = 8 + sites * width * table.element_size()  # its number, then its content at every site
        self._rows_per_send = max(1, min(max_rows, (staging_bytes or ROW_STAGING_BYTES) // row_bytes))
        self._staging = StagingRing((self._rows_per_send * row_bytes,), torch.uint8, table.device)
        self._arrived = torch.empty(self._rows_per_send * row_bytes, dtype=torch.uint8, device=table.device)

    @property
    def nbytes(self) -> int:
        """Device memory held for uploads, in bytes."""
        return self._arrived.nbytes

    def write(self, contents: Mapping[int, Content]) -> None:
        """Compose each content and write it to its row; no other row is touched."""
        numbered = list(contents.items())
        for start in range(0, len(numbered), self._rows_per_send):
            self._send(numbered[start : start + self._rows_per_send])

    def _send(self, numbered: list[tuple[int, Content]]) -> None:
        staged = self._staging.next().tensor
        rows, content = self._split(staged, len(numbered))
        nbytes = rows.nbytes + content.nbytes
        rows.numpy()[:] = [row for row, _ in numbered]
        for position, (_, one) in enumerate(numbered):
            content[:, position].copy_(torch.from_numpy(self._compose(one)))  # the one rounding to the table's dtype
        self._staging.send(staged[:nbytes], self._arrived[:nbytes])
        rows, content = self._split(self._arrived, len(numbered))
        self._table.index_copy_(1, rows, content)

    def _split(self, buffer: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """A staging buffer as row numbers [count] int64 and row contents [S, count, H] in the table's dtype."""
        sites, _, width = self._table.shape
        content_bytes = count * sites * width * self._table.element_size()
        rows = buffer[: 8 * count].view(torch.int64)
        content = buffer[8 * count : 8 * count + content_bytes].view(self._table.dtype)
        return rows, content.view(sites, count, width)


class FlagUploader:
    """Keeps the per-site `any_active` flags ([S, 1] bool) equal to the host's, written only when one changes."""

    def __init__(self, any_active: Tensor) -> None:
        self._device_flags = any_active.view(torch.uint8)[:, 0]  # strided: sites are aligned for the kernels
        self._held = np.zeros(len(self._device_flags), np.bool_)
        self._staging = StagingRing((len(self._held),), torch.uint8, any_active.device)

    def write(self, flags: npt.NDArray[np.bool_]) -> None:
        """Make the device's flags equal to `flags` [S]."""
        if np.array_equal(flags, self._held):
            return
        self._held[:] = flags
        staged = self._staging.next()
        staged.array[:] = flags
        self._staging.send(staged.tensor, self._device_flags)


class TokenUploader:
    """Keeps a slab of token records equal to the last plan. Whatever lies behind a plan's tokens is idle."""

    def __init__(self, token_slab: Tensor, idle: Words | None = None) -> None:
        """`token_slab` is uint8 [T, B] on the device, every token holding `idle` [B / 8]: by default row 0, gate 1."""
        self._slab_words = token_slab.view(torch.int64)  # words, not bytes: torch splits long copies among threads
        if idle is None:
            record = np.zeros(1, TOKEN)
            record["row_gate"] = 1.0
            idle = record.view(np.int64)
        self._idle = np.tile(idle, (len(token_slab), 1))
        self._held = self._idle.copy()  # what the device holds once the copies under way are done
        self._tokens = 0  # of the last plan; all behind them are idle
        self._staging = StagingRing(self._held.shape, torch.int64, token_slab.device)

    @property
    def tokens(self) -> int:
        """Tokens of the plan that the device holds; 0 when every token is idle."""
        return self._tokens

    @property
    def held(self) -> Words:
        """The records [tokens, B / 8] of that plan."""
        return self._held[: self._tokens]

    def write(self, words: Words, *, worn: bool = False) -> None:
        """Make `words` [N, B / 8] the device's plan, in one copy, or in none if it holds it already.

        `worn` says that it may not hold the last plan any more, where that had tokens.
        """
        count = len(words)
        if count == self._tokens and not (worn and count) and np.array_equal(words, self._held[:count]):
            return
        upto = max(count, self._tokens)  # a shorter plan also cleans what the longer one before it left behind
        self._held[:count] = words
        self._held[count:upto] = self._idle[count:upto]
        self._tokens = count
        staged = self._staging.next()
        staged.array[:upto] = self._held[:upto]
        self._staging.send(staged.tensor[:upto], self._slab_words[:upto])


NO_TOKENS: Words = np.zeros((0, TOKEN_WORDS), np.int64)
