"""The gates of admitted requests: which probes the device holds, and the gate records of a step's tokens.

A request's gates are a row of G records per phase, next to its token records. Probes are rows of a table of
their own, found by content like all rows; threshold, sharpness and options ride in the record, so a thousand requests
with one probe at a thousand thresholds share one row.

Of a request with spans each program has its G records on the device. What is planned for its tokens only names its
slot, and differs from all else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trimtab.ops.gate_buffers import GateBuffers, gate_record
from trimtab.program import PhaseProgram
from trimtab.program.joint_gate import lanes
from trimtab.program.programs import GatedProgram
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime.meters import GateMeters
from trimtab.runtime.rows import RowAllocator
from trimtab.runtime.step_plan import COLUMNS, RowUse, Words
from trimtab.runtime.upload import RowUploader, TokenUploader
from trimtab.vectors.values import FloatArray


class GateLanes:
    """The gates of each slot of a `StepPlanner`, and their way to the device. Rows are acquired by the runtime."""

    def __init__(self, buffers: GateBuffers, max_requests: int, decided: Tensor | None = None) -> None:
        self._buffers = buffers
        record = gate_record(buffers.count)
        self._records = np.zeros((max_requests + 1, COLUMNS), record)
        self._words = self._records.view(np.int64).reshape(max_requests + 1, -1)
        self._of_programs: dict[int, npt.NDArray[np.void]] = {}  # by slot, of requests with spans: [P]
        self._gated = np.zeros(max_requests + 1, np.bool_)
        self._joined = np.zeros(max_requests + 1, np.bool_)  # of these, those with a gate of several
        self._probes = RowAllocator(len(buffers.probe_table))
        self._read_at = np.zeros(len(buffers.probe_table), np.int32)  # how this rank numbers the site of each probe
        self._unwritten: dict[int, ResolvedGate] = {}
        self._table = RowUploader(buffers.probe_table[None], _direction)
        self._slab = TokenUploader(buffers.slab, np.zeros(record.itemsize // 8, np.int64))
        self.meters = GateMeters(buffers.values, buffers.owns, max_requests, decided)

    @property
    def count(self) -> int:
        """How many gates a phase may have."""
        return self._buffers.count

    @property
    def idle(self) -> bool:
        """Whether no token on the device has a gate."""
        return not self._slab.tokens

    @property
    def probes_in_use(self) -> int:
        """Probes that admitted requests hold."""
        return self._probes.in_use

    def add(
        self,
        slot: int,
        owner: str,
        programs: Sequence[Sequence[GatedProgram]],
        lowered: Sequence[ResolvedGate],
        acquire: Callable[[PhaseProgram], RowUse],
        *,
        decided: bool = False,
    ) -> None:
        """Give `slot`, which has none, the gates of all programs; `acquire` takes the row of a gated sum. What they
        do is reported under `owner`, and of those that are `lowered` to probes of its rows, that they are. There is a
        program for each phase, or the device has `decided` which is a token's.
        """
        if not (any(programs) or lowered):
            return
        records = np.zeros(len(programs), self._records.dtype) if decided else self._records[slot]
        for record, gated in zip(records, programs, strict=True):
            for place, (use, gate, join) in enumerate(_lanes_of(gated, acquire)):
                record["row"][place], coefficient = use
                record["probe"][place] = probe = self._probe(gate)
                record["site"][place] = self._read_at[probe]
                record["params"][place] = coefficient, gate.threshold, gate.sharpness, gate.invert, join
        self._gated[slot] = any(programs)
        self._joined[slot] = any(len(item.gate.members) > 1 for gated in programs for item in gated)
        if decided and any(programs):
            self._of_programs[slot] = records
            self._records["row"][slot, :, 0] = -slot
        here = self._buffers.number
        gates = [[(item.gate, here(item.gate.site) > 0) for item in gated] for gated in programs]
        self.meters.open_gates(slot, owner, gates, [gate for gate in lowered if here(gate.site)], decided=decided)

    def words_of_programs(self, slot: int) -> Words:
        """The records [P, W] of a request with spans, for each of its programs; [0, W] where it has no gates."""
        records = self._of_programs.get(slot, self._records[:0, 0])
        return records.view(np.int64).reshape(len(records), self._words.shape[1] // COLUMNS)

    def remove(self, slot: int) -> list[int]:
        """Take the gates of `slot` away; returns the rows that its gated sums held."""
        self.meters.close(slot)
        if not self._gated[slot]:
            return []
        self._gated[slot] = self._joined[slot] = False
        rows, probes = self.held_by(slot)
        for probe in probes:
            if self._probes.release(probe) and self._unwritten.pop(probe, None) is not None:
                self._probes.forget(probe)
        self._words[slot] = 0
        self._of_programs.pop(slot, None)
        return rows

    def held_by(self, slot: int) -> tuple[list[int], list[int]]:
        """The rows of the gated sums of `slot`, and the probes of its gates: one for each hold."""
        records = self._of_programs.get(slot, self._records[slot])
        return records["row"][records["row"] > 0].tolist(), records["probe"][records["probe"] > 0].tolist()

    def has_room(self, probes: Set[bytes], instead_of: Sequence[int]) -> bool:
        """Whether `probes`, by key, can be held once those of `instead_of` are let go."""
        return self._probes.has_room(probes, instead_of)

    def in_batch(self, slots: npt.NDArray[np.int64]) -> bool:
        """Whether any of `slots` has gates."""
        return bool(self._gated[slots].any())

    def write(self, slots: npt.NDArray[np.int64], counts: npt.NDArray[np.int64] | None) -> None:
        """Make the device's gates those of a batch: its slots [B] and their tokens [B, COLUMNS] per phase, or None."""
        if self._unwritten:
            self._table.write(self._unwritten)
            self._unwritten.clear()
        if counts is None:
            self._slab.write(np.zeros((0, self._words.shape[1] // COLUMNS), np.int64))
            self.meters.expect_none()
            return
        segments = self._words[slots].reshape(COLUMNS * len(slots), -1)
        self._slab.write(np.repeat(segments, counts.reshape(-1), axis=0))
        self.meters.expect_gates(slots, counts, joined=bool(self._joined[slots].any()))

    def state(self) -> Iterator[bytes]:
        """What the device holds and all that later choices depend on, the same on every pipeline stage, for digests.

        Numbers of sites differ from stage to stage, so in their place stands whether each is that of its probe.
        """
        yield repr((self.count, len(self._read_at))).encode()
        yield from self._probes.state()
        yield repr(sorted((probe, gate.digest.hex()) for probe, gate in self._unwritten.items())).encode()
        yield self._gated.tobytes() + self._joined.tobytes()
        planned = np.ascontiguousarray(self._slab.held).view(self._records.dtype)
        yield repr([(slot, len(records)) for slot, records in self._of_programs.items()]).encode()
        for records in (self._records, planned, *self._of_programs.values()):
            for field in ("row", "probe", "params"):
                yield records[field].tobytes()
            yield (records["site"] == self._read_at[records["probe"]]).tobytes()
        yield self.meters.state()

    def _probe(self, gate: ResolvedGate) -> int:
        probe, fresh = self._probes.acquire(gate.probe.digest)
        if fresh:
            self._unwritten[probe] = gate
            self._read_at[probe] = self._buffers.number(gate.site)
        return probe


def _lanes_of(
    gated: Iterable[GatedProgram], acquire: Callable[[PhaseProgram], RowUse]
) -> Iterator[tuple[RowUse, ResolvedGate, float]]:
    """The lanes of one program: what each lets through, its own gate, and how it is joined to the lane before it."""
    for item in gated:
        *first, (last, join) = lanes(item.gate)
        yield from ((RowUse(0, 0.0), gate, how) for gate, how in first)
        yield acquire(item.total), last, join


def _direction(gate: ResolvedGate) -> FloatArray:
    return gate.probe.block.copy()  # torch warns of arrays that are read-only
