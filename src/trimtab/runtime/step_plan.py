"""Step plans: what each token of one forward pass is routed to, as the bytes that the device will read.

A request's steering is a token record per phase. A step is then one gather (request -> its records) and one
repeat (record -> its tokens), whatever the mix of chunked prefill, recompute, speculation and decode: the phase of a
token is decided by its position, so a chunk that straddles the end of the prompt simply repeats both records.

The records of a request with spans only name its slot: the device writes over them (`ops.route`). They differ from all
others, so what it has written is never taken for what a later plan wants there.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.ops.buffers import TOKEN_BYTES
from trimtab.program import SPANS
from trimtab.sites import Phase

IntArray = npt.NDArray[np.int64]
Words = npt.NDArray[np.int64]  # token records seen as 8-byte words: gathering and repeating words is a plain memcpy

# One token's line of `SteeringBuffers.token_slab`. A row and its coefficient are one lane; `slot` is that of a request
# with spans, else 0.
TOKEN = np.dtype(
    {
        "names": ["index", "slot", "row_gate", "token_scale", "decode_mask"],
        "formats": [np.int64, np.int64, np.float32, np.float32, np.float32],
        "offsets": [0, 8, 16, 32, 48],
        "itemsize": TOKEN_BYTES,
    }
)
TOKEN_WORDS = TOKEN.itemsize // 8

PREFILL, DECODE = map(SPANS.index, Phase)  # columns of a slot's records
COLUMNS = len(SPANS)
RECORD_NAMES = slice(0, 2)  # words of a record: one that steers names a row, or its slot

NO_SLOT = 0  # the slot of every request that is not steered; its records route to row 0


class RowUse(NamedTuple):
    """What a token receives: `coefficient`, rounded to float32, times a table row."""

    row: int
    coefficient: float


class StepPlanner:
    """Turns batches into token records. Slots 1 .. max_requests belong to steered requests, slot 0 to all others."""

    def __init__(self, max_requests: int) -> None:
        self._records = np.zeros((max_requests + 1, COLUMNS), TOKEN)
        self._records["row_gate"] = 1.0
        self._records["decode_mask"][:, DECODE] = 1.0
        self._rows = self._records["index"]
        self._coefficients = self._records["row_gate"]
        self._record_words = self._records.view(np.int64).reshape(max_requests + 1, COLUMNS * TOKEN_WORDS)
        self._slot_of: dict[str, int] = {}
        self._free = list(range(max_requests, 0, -1))
        self._last_ids: list[str] | None = None
        self._last_slots = np.zeros(0, np.int64)
        self._last_steered = False
        self._is_planned = False  # whether the batch last given to `steers` has a plan
        self._resize(max_requests)

    @property
    def slots(self) -> dict[str, int]:
        """The slot of each steered request; for reading."""
        return self._slot_of

    @property
    def batch(self) -> IntArray:
        """The slots of the batch last given to `steers`, [B]."""
        return self._last_slots

    @property
    def counts(self) -> IntArray:
        """Tokens per request of that batch and phase, [B, COLUMNS], as `count` last found them."""
        return self._counts[: len(self._last_slots)]

    def rows(self, slots: IntArray) -> IntArray:
        """The rows of both phases of `slots` [B], as [B * COLUMNS]; 0 of requests with spans."""
        return self._rows[slots].reshape(-1)

    def held_by(self, slot: int) -> list[int]:
        """The row of each phase of `slot`: row 0 in that of all who are not steered, or have spans."""
        rows: list[int] = self._rows[slot].tolist()
        return rows

    def add(self, request_id: str, uses: Sequence[RowUse] | None) -> int:
        """Give `request_id`, not yet known, a slot with what the tokens of each phase receive; None: it has spans."""
        slot = self._free.pop()
        self._slot_of[request_id] = slot
        self._records["slot"][slot] = slot if uses is None else NO_SLOT
        self._rows[slot], self._coefficients[slot] = zip(*(uses or COLUMNS * (RowUse(0, 1.0),)), strict=True)
        self._last_ids = None
        return slot

    def remove(self, request_id: str) -> list[int]:
        """Free the slot of `request_id` and return the row of each of its phases; none if it has none."""
        slot = self._slot_of.pop(request_id, None)
        if slot is None:
            return []
        self._free.append(slot)
        self._last_ids = None
        return self.held_by(slot)

    def steers(self, request_ids: Sequence[str]) -> bool:
        """Whether anyone in the batch is steered, in either phase. Remembers the batch for `plan`."""
        # A batch usually has the members of the one before it: comparing ids costs less than looking each one up.
        # The copy is needed because engines edit their list of ids in place.
        ids = request_ids if isinstance(request_ids, list) else list(request_ids)
        if ids != self._last_ids:
            self._last_ids = ids.copy()
            self._last_slots = np.fromiter(map(self._slot_of.get, ids, repeat(NO_SLOT)), np.int64, len(ids))
            self._last_steered = bool(self._last_slots.any())
            self._is_planned = False
            if len(ids) > len(self._counts):
                self._resize(2 * len(ids))
        return self._last_steered

    def count(self, first_positions: IntArray, token_counts: IntArray, prompt_lengths: IntArray) -> bool:
        """Count the tokens of the batch last given to `steers`. Whether its last plan was of the same requests, with
        the same records, and of as many tokens each: then it is that of these tokens too."""
        counts = self._counts[: len(self._last_slots)]
        prefill = counts[:, PREFILL]
        np.subtract(prompt_lengths, first_positions, out=prefill)  # tokens of the prompt still to come
        np.maximum(prefill, 0, out=prefill)
        np.minimum(prefill, token_counts, out=prefill)
        np.subtract(token_counts, prefill, out=counts[:, DECODE])
        return self._is_planned and np.array_equal(counts, self._planned[: len(counts)])

    def plan(self) -> Words:
        """Token records [N, TOKEN_WORDS] of the N tokens that were counted last."""
        counts, segments = self.counts, self._segments[: len(self._last_slots)]
        self._planned[: len(counts)] = counts
        self._is_planned = True
        # mode="clip" lets numpy write to `out` without a copy; every slot is in range
        np.take(self._record_words, self._last_slots, axis=0, out=segments, mode="clip")
        return np.repeat(segments.reshape(-1, TOKEN_WORDS), counts.reshape(-1), axis=0)

    def state(self) -> bytes:
        """Who holds which slot, in order of admission, with which records, and the last batch's slots, for digests."""
        members = list(self._slot_of.items())
        known = repr((members, self._free, self._last_slots.tolist())).encode()
        # As words: copies of records leave whatever the memory held between their fields.
        return known + self._record_words[[slot for _, slot in members]].tobytes()

    def _resize(self, batch: int) -> None:
        self._counts = np.zeros((batch, COLUMNS), np.int64)
        self._planned = np.zeros((batch, COLUMNS), np.int64)  # those of the last plan
        self._segments = np.zeros((batch, COLUMNS * TOKEN_WORDS), np.int64)


def as_ints(values: Any) -> IntArray:
    """An int64 view or copy of whatever integer array an engine keeps."""
    return np.asarray(values, np.int64)
