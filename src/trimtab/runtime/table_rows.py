"""The rows of an engine's tables: who holds which, what is in them and where, and what the device has yet to see.

A row is the content of a program, or a direction that slots read or write along. No token is routed to a direction, so
it makes no site busy.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trimtab.ops.buffers import SteeringBuffers
from trimtab.runtime.rows import RowAllocator
from trimtab.runtime.upload import FlagUploader, RowUploader
from trimtab.sites import Site
from trimtab.vectors.values import FloatArray


class RowContent(Protocol):
    """What a row can hold: `row` at any sites, counted in `unit`s (see `PhaseProgram.row`)."""

    @property
    def unit(self) -> float: ...

    def row(self, sites: Sequence[Site]) -> FloatArray: ...


class TableRows:
    """Rows by content. Nothing is written to the device outside `write`."""

    def __init__(self, buffers: SteeringBuffers) -> None:
        max_rows, sites = buffers.table.shape[1], len(buffers.sites)
        self.capacity = max_rows - 1  # row 0 never holds content
        self.uploads = 0  # rows written to the device
        self._sites = buffers.sites
        self._site_position = {site: position for position, site in enumerate(buffers.sites)}
        self._allocator = RowAllocator(max_rows)
        self._units = np.ones(max_rows)  # what one stands for in each row: see `PhaseProgram.unit`
        self._row_sites = np.zeros((max_rows, sites), np.bool_)  # where a token of the row may change
        self._site_rows = np.zeros(sites, np.int64)  # held rows of which that is so at each site
        self._unwritten: dict[int, RowContent] = {}  # held rows whose content the device has not seen
        self._turned: set[int] = set()  # rows that are held where the device's flags take them for idle, or the reverse
        self._table = RowUploader(buffers.table, self._compose)
        self._flags = FlagUploader(buffers.any_active)

    @property
    def in_use(self) -> int:
        """Rows that are held."""
        return self._allocator.in_use

    @property
    def stale(self) -> bool:
        """Whether the device's flags are not those of the rows held now."""
        return bool(self._turned)

    def has_room(self, keys: Set[bytes], instead_of: Iterable[int]) -> bool:
        """Whether rows of all `keys` can be held once those of `instead_of`, one for each hold, are let go."""
        return self._allocator.has_room(keys, instead_of)

    def acquire(self, key: bytes, content: RowContent, acts_at: Iterable[Site] = ()) -> tuple[int, bool]:
        """The row of `key`, held once more, and whether it is new: then it will hold `content`.

        `acts_at` are the sites at which its tokens may change. Those of other pipeline stages mean nothing here.
        """
        row, fresh = self._allocator.acquire(key)
        if fresh:
            self._unwritten[row] = content
            self._units[row] = content.unit
            self._row_sites[row] = False
            self._row_sites[row, [self._site_position[s] for s in acts_at if s in self._site_position]] = True
        if self._allocator.holders(row) == 1:
            self._site_rows += self._row_sites[row]
            self._turned ^= {row}
        return row, fresh

    def release(self, row: int) -> bool:
        """Let go of `row` once; whether nobody holds it any more."""
        if not self._allocator.release(row):
            return False
        self._site_rows -= self._row_sites[row]
        self._turned ^= {row}
        if self._unwritten.pop(row, None) is not None:
            self._allocator.forget(row)  # the device never saw this content, so there is nothing worth keeping
        return True

    def unit(self, row: int) -> float:
        """What one stands for in `row`."""
        return float(self._units[row])

    def sites_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """[S]: the sites at which tokens of any of `rows` may change."""
        return np.asarray(np.logical_or.reduce(self._row_sites[rows]))

    def write(self) -> None:
        """Bring the device up to date."""
        if not (self._unwritten or self._turned):
            return
        if self._unwritten:
            self._table.write(self._unwritten)
            self.uploads += len(self._unwritten)
            self._unwritten.clear()
        self._flags.write(self._site_rows > 0)
        self._turned.clear()

    def state(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """What later choices and the device's content follow from, the same on every pipeline stage, for digests."""
        yield "rows", self._allocator.state()
        yield "content", (self._units.tobytes(), repr((sorted(self._unwritten), sorted(self._turned))).encode())
        held = [row for row in range(len(self._row_sites)) if self._allocator.holders(row)]
        in_place = self._site_rows == self._row_sites[held].sum(axis=0)  # sites differ from stage to stage
        yield "sites", (b"as held" if in_place.all() else in_place.tobytes(),)

    def _compose(self, content: RowContent) -> FloatArray:
        return content.row(self._sites)
