"""The slots of rows: what the device is told of them, at each site of this rank where slots can act.

A token's row names its program, so its slots are those of its row. Their directions are rows of the same table: they
are held as long as the program is. Which rows those are may be others when the program comes back, so its record is
written when its row is new, and when the rows of its directions are not those that it names.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trimtab.errors import SteeringError
from trimtab.ops.buffers import SteeringBuffers
from trimtab.ops.slot_buffers import SlotBuffers, slot_record
from trimtab.program import PhaseProgram, ResolvedSteering, Slot
from trimtab.program.slot_sets import mixing
from trimtab.program.slots import place_of_second
from trimtab.responses import RESPONSES
from trimtab.runtime.upload import RowUploader
from trimtab.sites import Site
from trimtab.wording import summary

Matrix = npt.NDArray[np.float64]


class Record(NamedTuple):
    """What the record of a row is made of: its slots, the lane of each one's gate (0 = none), table rows by key."""

    slots: tuple[Slot, ...]
    lanes: tuple[int, ...]
    rows: Mapping[bytes, int]


def check_slots(request_id: str, steering: ResolvedSteering, buffers: SteeringBuffers) -> None:
    """Raise SteeringError where these buffers cannot hold every slot of `steering`."""
    for program in steering.programs:
        if program.slots and (fault := _fault(program.slots, buffers)) is not None:
            raise SteeringError("slots", f"request {request_id!r} brings {fault}")


def _fault(slots: Sequence[Slot], buffers: SteeringBuffers) -> str | None:
    if buffers.slots is None:
        return f"{len(slots)}; the buffers hold none"
    form = buffers.slots.form
    without = set(buffers.sites) - set(buffers.slots.sites)
    for slot in slots:
        if slot.response not in form.responses:
            return f"the response {slot.response!r}; the buffers hold {', '.join(form.responses)}"
        if slot.write is not None and not form.writes:
            return "one that writes along another direction than it reads; the buffers hold none such"
        if missing := [site for site in slot.sites if site in without]:
            return f"one at {summary(missing)}, where none can act"
    ((site, most),) = Counter(site for slot in slots for site in slot.sites).most_common(1)
    return f"{most} at {site}; the buffers hold {form.count} for one site" if most > form.count else None


class SlotRows:
    """The slot records of an engine's rows. Nothing is written to the device outside `write`."""

    def __init__(self, buffers: SteeringBuffers, slots: SlotBuffers) -> None:
        self._dtype = buffers.table.dtype
        self._slots = slots
        self._held: dict[int, Record] = {}  # rows whose record on the device is not zero
        self._unwritten: dict[int, Record | None] = {}  # held rows whose record the device has not seen; None: zero
        self._uploader: RowUploader[Record | None] = RowUploader(slots.slab, self._compose)

    def fill(self, row: int, program: PhaseProgram, rows: Mapping[bytes, int], *, fresh: bool) -> None:
        """`row` is held by `program`, whose directions are among `rows`; `fresh`: it held something else before."""
        rows = {way.row_key: rows[way.row_key] for slot in program.slots for way in slot.directions}
        known = self._unwritten.get(row, self._held.get(row))
        if program.slots and (fresh or known is None or known.rows != rows):
            self._unwritten[row] = Record(program.slots, program.lanes, rows)
        elif fresh:
            self.clear(row)

    def clear(self, row: int) -> None:
        """`row` has new content that goes without slots."""
        if row in self._held:
            self._unwritten[row] = None

    def let_go(self, row: int) -> None:
        """Nobody holds `row` any more: what the device has not seen of it can wait until somebody does."""
        self._unwritten.pop(row, None)

    def write(self) -> None:
        """Bring the device up to date."""
        if not self._unwritten:
            return
        if self._slots.sites:
            self._uploader.write(self._unwritten)
        for row, record in self._unwritten.items():
            if record is None:
                del self._held[row]
            else:
                self._held[row] = record
        self._unwritten.clear()

    def state(self) -> Iterator[bytes]:
        """The records of all rows, and those that the device has yet to see, for digests."""
        yield repr(self._slots.form).encode()
        for records in (self._held, self._unwritten):
            for row, record in sorted(records.items()):
                said = () if record is None else (record.lanes, sorted(record.rows.items()))
                yield repr((row, said)).encode()
                yield b"" if record is None else b"".join(slot.digest for slot in record.slots)
            yield b"-"

    def _compose(self, record: Record | None) -> npt.NDArray[np.uint8]:
        """Its lines [S, B] at every site of this rank where slots can act."""
        sites = self._slots.sites
        lines = np.zeros(len(sites), slot_record(self._slots.form))
        if record is not None:
            stored = _Stored(record.slots, sites, self._dtype)
            for position, site in enumerate(sites):
                acting = [index for index, slot in enumerate(record.slots) if site in slot.at]
                for k, index in enumerate(acting):
                    slot = record.slots[index]
                    bias, own = slot.at[site]
                    ways = (slot.read, slot.write)
                    lines["rows"][position, k] = [0 if way is None else record.rows[way.row_key] for way in ways]
                    lines["codes"][position, k] = RESPONSES[slot.response].code, record.lanes[index]
                    factor = 0.0 if slot.read is None else slot.read.unit
                    lines["params"][position, k, : 2 + len(own)] = factor, bias, *own
                    if slot.second is not None:
                        others = [record.slots[other] for other in acting]
                        lines["params"][position, k, -1] = place_of_second(slot, others, site)
                if acting:
                    mix = stored.mix(acting, position)
                    lines["mix"][position, : len(acting), : len(acting)] = mix
        return lines.view(np.uint8).reshape(len(sites), -1)


class _Stored:
    """The directions of a program's set as the table holds them at each site, and how the slots there are mixed."""

    def __init__(self, slots: Sequence[Slot], sites: Sequence[Site], dtype: torch.dtype) -> None:
        self._members = np.array([slot.is_member for slot in slots])
        self._rows = np.zeros((len(slots), len(sites), slots[0].hidden_size))
        self._units = np.ones(len(slots))
        for index, slot in enumerate(slots):
            along = slot.read if slot.write is None else slot.write
            self._units[index] = 0.0 if along is None else along.unit
            if slot.is_member and along is not None:
                rounded = torch.from_numpy(along.row(sites)).to(dtype).double().numpy()
                self._rows[index] = rounded * along.unit
        self._mixed: dict[tuple[int, ...], tuple[Matrix, Matrix]] = {}  # of slots: their rows, and what came of them

    def mix(self, acting: Sequence[int], position: int) -> Matrix:
        """Float64 [K, K] for the slots `acting` at one site: how far each writes, in units of its row, for each number.

        Where they have the directions that they had at the last such site, as spread ones do, nothing is computed.
        """
        chosen = list(acting)
        rows = self._rows[chosen, position]
        known = self._mixed.get(tuple(chosen))
        if known is None or not np.array_equal(known[0], rows):
            known = self._mixed[tuple(chosen)] = rows, mixing(rows, self._members[chosen])
        return self._units[chosen, None] * known[1]
