"""Requests with spans: what the device holds of each, and how it is told to decide about a pass.

A line of tables belongs to each slot of the planner. It is written once, when its request is admitted, and does not
change while it runs. Beside it is a ring of the request's last tokens, which the device keeps by itself: the host
writes it where a request begins behind tokens that this device has not computed for it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.errors import SteeringError
from trimtab.ops.args import RouteOpArgs
from trimtab.ops.route import route_args, warmup_route_kernel
from trimtab.ops.span_buffers import SpanBuffers
from trimtab.program.spans import Spans
from trimtab.runtime.span_lines import Schedules, ring_after, span_line
from trimtab.runtime.step_plan import TOKEN, TOKEN_WORDS, IntArray, RowUse, Words
from trimtab.runtime.upload import RowUploader
from trimtab.sites import Phase

STAGING_BYTES = 1 << 20  # lines of some 40 requests; a burst of more goes up in several pieces

Line = npt.NDArray[np.void]
Ring = npt.NDArray[np.int32]


class _Held(NamedTuple):
    """A request's spans, and what its programs' tokens receive."""

    spans: Spans
    uses: tuple[RowUse, ...]
    schedules: Schedules


class SpanTables:
    """The spans of each slot of a `StepPlanner`, and their way to the device. Rows are acquired by the runtime."""

    def __init__(
        self, buffers: SpanBuffers, token_slab: Tensor, gate_slab: Tensor | None, max_requests: int, sites: int
    ) -> None:
        if (most := len(buffers.slab) - 1) < max_requests:
            raise SteeringError("max_requests", f"{max_requests} given; the buffers have room for spans of {most}")
        self._buffers = buffers
        self._token_words = token_slab.view(torch.int64)
        no_gates = torch.empty(len(token_slab), 0, dtype=torch.int64, device=token_slab.device)
        self._gate_words = no_gates if gate_slab is None else gate_slab.view(torch.int64)
        self._held: dict[int, _Held] = {}
        self._has = np.zeros(max_requests + 1, np.bool_)  # by slot
        self._by_ids = np.zeros(max_requests + 1, np.bool_)  # of these, those whose tokens' ids decide
        self._sites = np.zeros((max_requests + 1, sites), np.bool_)  # by slot: where its tokens may change
        self._unwritten: dict[int, Line] = {}
        self._unseeded: dict[int, Ring] = {}
        self._lines = RowUploader(buffers.slab.view(torch.int64)[None], _words_of, STAGING_BYTES)
        self._rings = RowUploader(buffers.rings.view(torch.int64).flatten(1)[None], _words_of, STAGING_BYTES)

    def add(
        self,
        slot: int,
        spans: Spans,
        uses: Sequence[RowUse],
        gates: Words | None,
        schedules: Schedules,
        sites: npt.NDArray[np.bool_],
    ) -> None:
        """Give `slot`, which has none, the spans of a request whose programs' tokens receive `uses`, with `gates`
        [P, W], their gate records, if any, both by `schedules`. They may change at `sites` [S]. `seed` says what it
        begins behind."""
        records = np.zeros(len(uses), TOKEN)
        records["index"], records["row_gate"] = zip(*uses, strict=True)
        records["decode_mask"] = [phase is Phase.DECODE for phase in spans.phases]
        line = span_line(self._buffers.record, spans, records.view(np.int64).reshape(-1, TOKEN_WORDS), schedules)
        if gates is not None:
            line["gates"][0, : len(gates)] = gates
        self._held[slot] = _Held(spans, tuple(uses), schedules)
        self._has[slot] = True
        self._sites[slot] = sites
        self._by_ids[slot] = spans.decided_by_tokens
        self._unwritten[slot] = line

    def seed(self, slot: int, tokens: Sequence[int], upto: int) -> None:
        """The first position of `slot` to be computed is `upto`; `tokens` are those before it, or more."""
        if self._by_ids[slot] and upto:
            self._unseeded[slot] = ring_after(self._held[slot].spans, tokens, upto)

    def remove(self, slot: int) -> list[int]:
        """Take the spans of `slot` away; returns the rows of its programs."""
        rows = self.held_by(slot)
        self._held.pop(slot, None)
        self._unwritten.pop(slot, None)
        self._unseeded.pop(slot, None)
        self._has[slot] = self._by_ids[slot] = self._sites[slot] = False
        return rows

    def held_by(self, slot: int) -> list[int]:
        """The row of each program of `slot`; none where it has no spans."""
        return [use.row for use in self._held[slot].uses] if slot in self._held else []

    def sites_of(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """[S]: the sites at which tokens of any of `slots` may change that have spans."""
        return np.asarray(np.logical_or.reduce(self._sites[slots]))

    def write(self) -> None:
        """Bring the device up to date."""
        if self._unwritten:
            self._lines.write(self._unwritten)
            self._unwritten.clear()
        if self._unseeded:
            self._rings.write(self._unseeded)
            self._unseeded.clear()

    def decision(self, slots: IntArray, positions: Tensor | None, token_ids: Tensor | None) -> RouteOpArgs | None:
        """What decides about the tokens of a pass over `slots`, once all of them are planned; None: none has spans.

        Raises ValueError where the positions are missing that decide, or the ids.
        """
        if not self._held or not self._has[slots].any():
            return None
        if positions is None:
            raise ValueError("tokens are steered by their positions, and no positions were given")
        if token_ids is None and self._by_ids[slots].any():
            raise ValueError("tokens are steered by their ids, and no ids were given")
        return route_args(self._buffers, self._token_words, self._gate_words, positions, token_ids)

    def warm_up(self, positions: torch.dtype, token_ids: torch.dtype) -> int:
        """Launch what decides in passes with such positions and ids, for one token of nobody. How many variants that
        compiled: where tensors lie selects none."""
        device = self._token_words.device
        place, one_id = (torch.zeros(1, dtype=kind, device=device) for kind in (positions, token_ids))
        parts = (self._buffers, self._token_words, self._gate_words, place)
        return warmup_route_kernel([route_args(*parts, ids) for ids in (one_id, None)])

    def state(self) -> Iterator[bytes]:
        """The spans of all slots, and what the device has yet to see of them, for digests."""
        for slot, held in self._held.items():
            yield repr((slot, held)).encode()
        yield repr(sorted(self._unwritten)).encode()
        for slot, ring in sorted(self._unseeded.items()):
            yield repr(slot).encode() + ring.tobytes()


def _words_of(line: Line | Ring) -> npt.NDArray[np.int64]:
    return line.reshape(1, -1).view(np.int64)
