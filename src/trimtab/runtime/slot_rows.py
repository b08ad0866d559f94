"""The slots of rows: what the device is told of them, at each site of this rank where slots can act.

A token's row names its program, so its slots are those of its row. Their directions are rows of the same table: they
are held as long as the program is. Which rows those are may be others when the program comes back, so its record is
written when its row is new, and when the rows of its directions are not those that it names.
"""

import hashlib
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
from trimtab.program.slots import Numbers, a_few, counted, measured_slots, place_of_second
from trimtab.recent import Recent
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
    ((site, most),) = counted(slots).most_common(1)
    return f"{most} at {site}; the buffers hold {form.count} for one site" if most > form.count else None


class SlotRows:
    """The slot records of an engine's rows. Nothing is written to the device outside `write`."""

    def __init__(self, buffers: SteeringBuffers, slots: SlotBuffers) -> None:
        self._dtype = buffers.table.dtype
        self._slots = slots
        self._held: dict[int, Record] = {}  # rows whose record on the device is not zero
        self._unwritten: dict[int, Record | None] = {}  # held rows whose record the device has not seen; None: zero
        self._known: Recent[Matrix] = Recent(kept_bytes=4 << 20)  # how slots are mixed, whatever their numbers
        self._uploader: RowUploader[Record | None] = RowUploader(slots.slab, self._compose)

    def fill(self, row: int, program: PhaseProgram, rows: Mapping[bytes, int], *, fresh: bool) -> None:
        """`row` is held by `program`, whose directions are among `rows`; `fresh`: it held something else before."""
        rows = {way.row_key: rows[way.row_key] for slot in program.slots for way in slot.rows}
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

    @property
    def stale(self) -> bool:
        """Whether the device has not seen every record."""
        return bool(self._unwritten)

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
            order = {slot.digest: place for place, slot in enumerate(measured_slots(record.slots), 1)}
            places = [order.pop(slot.digest, 0) for slot in record.slots]  # of equal ones the first has it
            for acting, positions in _alike(record.slots, sites).items():
                chosen = [record.slots[index] for index, _ in acting]
                for k, (index, (bias, own)) in enumerate(acting):
                    slot = record.slots[index]
                    lines["places"][positions, k] = places[index]
                    named = [0 if way is None else record.rows[way.row_key] for way in slot.columns]
                    lines["rows"][positions, k, : len(named)] = named
                    lines["codes"][positions, k] = RESPONSES[slot.response].code, record.lanes[index]
                    factor = 0.0 if slot.columns[0] is None else slot.columns[0].unit
                    lines["params"][positions, k, : 2 + len(own)] = factor, bias, *own
                    if slot.second is not None:
                        lines["params"][positions, k, -1] = place_of_second(slot, chosen, sites[positions[0]])
                mix = self._mixed(chosen, positions)
                lines["mix"][positions, : len(acting), : len(acting)] = mix
        return lines.view(np.uint8).reshape(len(sites), -1)

    def _mixed(self, slots: Sequence[Slot], positions: Sequence[int]) -> Matrix:
        """Float64 [P, K, K] for slots that act together: how far each writes, in units of its row, for each number."""
        along = [slot.read if slot.write is None else slot.write for slot in slots]
        told = b"".join(slot.read.row_key if slot.is_member and slot.read is not None else b"-" for slot in slots)
        key = hashlib.sha256(told + np.array(positions).tobytes()).digest()
        mixed = self._known.get(key)
        if mixed is None:
            mixed = self._mixing(slots, positions)
            self._known.put(key, mixed, mixed.nbytes)
        units = np.array([0.0 if way is None else way.unit for way in along])
        return units[:, None] * mixed

    def _mixing(self, slots: Sequence[Slot], positions: Sequence[int]) -> Matrix:
        """`mixing` of these slots at each of these sites. Where they have the directions that they had at the last one,
        as spread ones do, nothing is computed."""
        members = np.array([slot.is_member for slot in slots])
        ways = [slot.read for slot in slots if slot.is_member and slot.read is not None]
        sites = [self._slots.sites[position] for position in positions]
        mixed: list[Matrix] = []
        last = None
        width = max(1, *(slot.hidden_size for slot in slots))
        for some in a_few(sites, len(slots) * width):
            rows = np.zeros((len(some), len(slots), width))
            for index, way in zip(np.flatnonzero(members), ways, strict=True):
                rows[:, index] = torch.from_numpy(way.row(some)).to(self._dtype).double().numpy() * way.unit
            for at_site in rows:
                same = last is not None and np.array_equal(last, at_site)
                mixed.append(mixed[-1] if same else mixing(at_site, members))
                last = at_site
        return np.stack(mixed)


def _alike(slots: Sequence[Slot], sites: Sequence[Site]) -> dict[tuple[tuple[int, Numbers], ...], list[int]]:
    """The places of the sites at which the same of the slots act with the same numbers, by their places and numbers."""
    places: dict[tuple[tuple[int, Numbers], ...], list[int]] = {}
    for place, site in enumerate(sites):
        numbers = [(index, slot.at.get(site)) for index, slot in enumerate(slots)]
        acting = tuple((index, own) for index, own in numbers if own is not None)
        if acting:
            places.setdefault(acting, []).append(place)
    return places
