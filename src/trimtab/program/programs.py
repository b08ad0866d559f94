"""What a spec comes down to once its names are known: for each phase, a sum of vectors with their scales, and slots.

A program is canonical: two requests that add the same numbers have the same terms, the same row and the same identity,
however they were written. The engines receive nothing else of a request.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.program.joint_gate import Condition, is_clock, schedule_of
from trimtab.program.ranges import MAX_VALUE, fault_of_range, unit_of
from trimtab.program.resolved_gate import VectorReference
from trimtab.program.slot_sets import formed
from trimtab.program.slots import Slot, check_seconds
from trimtab.responses import Stage
from trimtab.sites import Site, site_order
from trimtab.vectors.values import FloatArray
from trimtab.vectors.vector import SteeringVector


@dataclass(frozen=True, slots=True)
class Term:
    """One vector, its scale, and the gate that it stands behind, if any.

    `reference` says how a process that holds the same vectors can be told of it.
    """

    vector: SteeringVector
    scale: float
    reference: VectorReference | None = field(default=None, compare=False)
    gate: Condition | None = None
    asked_by: frozenset[int] = field(default=frozenset(), compare=False)  # interventions of a spec, by their index

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts, in forward order."""
        return self.vector.sites

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.vector.hidden_size


@dataclass(frozen=True)
class PhaseProgram:
    """What is done to the tokens of one phase; build it with `PhaseProgram.of`.

    `terms` are added to every token, `gated` as far as a gate says, and `slots` act on what comes of that. `row_key`
    names the content of the table row of `terms`, and the slots that go with it (b"" = none: row 0); a token receives
    the content times `factor`: a vector's scale, or 1. `gated` has every gate of the program once, that of slots alone
    with an empty sum. `identity` is the hex digest of all of it ("" = unsteered) and hence of all that changes the
    token's KV cache.
    """

    terms: tuple[Term, ...]
    row_key: bytes
    factor: float
    identity: str
    gated: tuple["GatedProgram", ...] = ()
    slots: tuple[Slot, ...] = ()

    @classmethod
    def of(cls, terms: Iterable[Term], slots: Iterable[Slot] = ()) -> "PhaseProgram":
        """The canonical program: sorted by digest, equal vectors merged, sets formed, what does nothing dropped.

        One vector is its own row and its scale the factor, so that every scale of it shares one row; a sum has its
        scales inside the row. Terms behind equal gates are one gated sum, and gates of nothing are dropped. Raises
        `ValueError` for different widths, `SteeringError` without a field for values out of range, for sets that cannot
        be honoured (`trimtab.program.slot_sets`), and for second scores that no slot reads.
        """
        summed, slots = cls._summed(terms), tuple(slots)
        if slots:
            _check_widths([*summed.vectors, *(vector for slot in slots for vector in slot.vectors)])
        kept = formed(slots)
        check_seconds(kept)
        if not summed.identity and all(slot.stage is Stage.LAST for slot in kept):
            return EMPTY  # they act on what others have done
        return summed._with_slots(kept) if kept else summed

    def _with_slots(self, slots: tuple[Slot, ...]) -> "PhaseProgram":
        """The program whose terms are those of this one, which has no slots."""
        totals = {item.gate.digest: item.total for item in self.gated}
        gates = [*(item.gate for item in self.gated), *(slot.gate for slot in slots if slot.gate is not None)]
        gated = tuple(GatedProgram(gate, totals.get(gate.digest, EMPTY)) for gate in distinct(gates))
        digests = b"".join(slot.digest for slot in slots)
        own = _lanes(slots, gated)  # which a row's record tells
        key = hashlib.sha256(b"trimtab slot row 1\0" + struct.pack("?", bool(self.row_key)) + self.row_key + digests)
        key.update(struct.pack(f"<{len(own)}i", *own))
        whole = b"trimtab slot program 1\0" + struct.pack("?", bool(self.identity)) + bytes.fromhex(self.identity)
        return replace(
            self,
            row_key=key.digest(),
            factor=self.factor if self.terms else 1.0,
            identity=hashlib.sha256(whole + digests).hexdigest(),
            gated=gated,
            slots=slots,
        )

    @classmethod
    def _summed(cls, terms: Iterable[Term]) -> "PhaseProgram":
        terms = list(terms)
        behind = [term for term in terms if term.gate is not None]
        plain = cls._ungated(term for term in terms if term.gate is None)
        if not behind:
            return plain
        gated = tuple(
            GatedProgram(gate, total)
            for gate in distinct(term.gate for term in behind if term.gate is not None)
            if (total := cls._ungated(replace(term, gate=None) for term in behind if term.gate == gate)).terms
        )
        if not gated:
            return plain
        _check_range([*plain.terms, *(term for item in gated for term in item.total.terms)])
        _check_widths(term.vector for total in (plain, *(item.total for item in gated)) for term in total.terms)
        whole = b"trimtab gated program 1\0" + bytes.fromhex(plain.identity) + b"\0"
        whole += b"".join(item.gate.digest + bytes.fromhex(item.total.identity) for item in gated)
        return cls(plain.terms, plain.row_key, plain.factor, hashlib.sha256(whole).hexdigest(), gated)

    @classmethod
    def _ungated(cls, terms: Iterable[Term]) -> "PhaseProgram":
        groups: dict[bytes, list[Term]] = {}
        for term in terms:
            groups.setdefault(term.vector.digest, []).append(term)
        kept = [group[0] if len(group) == 1 else _merged(group) for _, group in sorted(groups.items())]
        kept = [term for term in kept if term.scale != 0.0 and term.vector.max_abs != 0.0]
        if not kept:
            return EMPTY
        _check_range(kept)
        return cls._sum(kept)

    @classmethod
    def joined(cls, parts: Iterable["PhaseProgram"]) -> "PhaseProgram":
        """The sum of what the ungated terms of `parts` add, for one row: parts of one program, of different vectors."""
        return cls._sum(sorted(cls._joining(parts), key=lambda term: term.vector.digest))

    @staticmethod
    def _joining(parts: Iterable["PhaseProgram"]) -> Iterator[Term]:
        """A vector alone is scaled by a float32 where it is not joined, and its identity knows no other scale."""
        for part in parts:
            alone = len(part.terms) == 1
            yield from (replace(term, scale=float(np.float32(term.scale))) if alone else term for term in part.terms)

    @classmethod
    def _sum(cls, kept: list[Term]) -> "PhaseProgram":
        if len(kept) == 1:
            row_key, factor = kept[0].vector.digest, kept[0].scale
            coefficient = factor * unit_of(kept[0].vector.max_abs)
        else:
            _check_widths(term.vector for term in kept)
            content = b"".join(term.vector.digest + struct.pack("<d", term.scale) for term in kept)
            row_key, factor = hashlib.sha256(b"trimtab row 1\0" + content).digest(), 1.0
            coefficient = 1.0  # a sum's unit follows from its content, which the row key names
        whole = b"trimtab program 2\0" + row_key + struct.pack("<f", coefficient)
        return cls(tuple(kept), row_key, factor, hashlib.sha256(whole).hexdigest())

    @property
    def all_terms(self) -> Iterator[Term]:
        """The terms of every token and those behind gates, in canonical order."""
        yield from self.terms
        for item in self.gated:
            yield from (replace(term, gate=item.gate) for term in item.total.terms)

    @property
    def lanes(self) -> tuple[int, ...]:
        """For each slot the lane in which its gate's factor is, counted from 1; 0 where it has none.

        The gates of `gated` have lanes in their order, one for each member, and the last member's has the factor.
        """
        return _lanes(self.slots, self.gated)

    @property
    def scheduled_row(self) -> "GatedProgram | None":
        """The first sum behind a schedule alone that the program's own row can hold: where nothing is added, and
        nothing corrected, at full strength."""
        clocked = (item for item in self.gated if is_clock(item.gate))
        return None if self.terms or self.slots else next(clocked, None)

    @property
    def lane_gates(self) -> Iterator[tuple[Condition, tuple[Site, ...]]]:
        """The gates that take lanes, each with the sites of what stands behind it."""
        yield from ((item.gate, item.total.sites) for item in self.gated if item is not self.scheduled_row)
        yield from ((slot.gate, slot.sites) for slot in self.slots if slot.gate is not None)

    @property
    def is_scheduled(self) -> bool:
        """Whether anything of it follows a schedule."""
        return any(schedule_of(item.gate) is not None for item in self.gated)

    @property
    def lane_count(self) -> int:
        """How many lanes its gates have; the schedule of its row has none."""
        return sum(len(item.gate.members) for item in self.gated) - (self.scheduled_row is not None)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which something is or may be done, in the order of the forward pass."""
        acting = {vector.sites for vector in self.vectors} | {slot.sites for slot in self.slots}
        return together(*acting)

    @property
    def hidden_size(self) -> int:
        """H. Raises `ValueError` for the empty program, which has none."""
        widths = [vector.hidden_size for vector in (*self.vectors, *(v for slot in self.slots for v in slot.vectors))]
        if not widths:
            raise ValueError("the empty program has no width")
        return widths[0]

    @property
    def vectors(self) -> Iterator[SteeringVector]:
        """The vectors of all terms, in canonical order."""
        for total in (self, *(item.total for item in self.gated)):
            yield from (term.vector for term in total.terms)

    @property
    def unit(self) -> float:
        """The power of two that `row` counts in; `factor` times it is a normal number of float32.

        Of a sum it is computed from all of its numbers, at each call. Without terms it is 1.
        """
        if not self.terms:
            return 1.0
        if len(self.terms) == 1:
            return unit_of(self.terms[0].vector.max_abs)
        whole = self._content(together(*{term.vector.sites for term in self.terms}))
        return max(unit_of(float(np.abs(whole).max())), 2.0**-126)  # terms may cancel to less than `MIN_VALUE`

    @property
    def coefficient(self) -> float:
        """What a token multiplies `row` by, before it is rounded to float32; 0 where there is none."""
        return self.factor * self.unit if self.row_key else 0.0

    def row(self, sites: Sequence[Site], out: FloatArray | None = None) -> FloatArray:
        """The content of this program's table row at `sites`, in units of `unit`: float32 [len(sites), H].

        It is zero where the program has no direction; a token that multiplies it by `coefficient` receives the sum.
        No number is larger than `MAX_VALUE`, and the largest, which may be at another site, is at least half of that.
        Sums are taken in float64 in canonical order and rounded once, so every rank composes the same bits. Where there
        are slots and no terms all of it is zero. Writes to `out` if given. Raises `ValueError` for the empty program,
        which has no row.
        """
        if not self.row_key:
            raise ValueError("the empty program has no row of its own: its tokens use row 0")
        shape = (len(sites), self.hidden_size)
        result = np.empty(shape, np.float32) if out is None else out
        if result.shape != shape:
            raise ValueError(f"out has shape {result.shape}, want {shape}")
        if not self.terms:
            result.fill(0.0)
            return result
        per_unit = np.float64(1.0 / self.unit)  # float64: it need not be a float32 number
        if len(self.terms) == 1 and tuple(sites) == self.terms[0].vector.sites:
            return np.multiply(self.terms[0].vector.block, per_unit, out=result, casting="same_kind")
        return np.multiply(self._content(sites), per_unit, out=result, casting="same_kind")

    def _content(self, sites: Sequence[Site]) -> npt.NDArray[np.float64]:
        """What a token receives for each unit of `factor`: float64 [len(sites), H]."""
        total = np.zeros((len(sites), self.hidden_size), np.float64)
        for term in self.terms:
            scale = np.float64(1.0 if len(self.terms) == 1 else term.scale)
            for position, site in enumerate(sites):
                if (direction := term.vector.directions.get(site)) is not None:
                    total[position] += direction * scale
        return total


@dataclass(frozen=True)
class GatedProgram:
    """The sum that one gate lets through, per token: `total` has terms and no gates of its own."""

    gate: Condition
    total: PhaseProgram


EMPTY = PhaseProgram((), b"", 0.0, "")


def _lanes(slots: Iterable[Slot], gated: Iterable[GatedProgram]) -> tuple[int, ...]:
    number, taken = {}, 0
    for item in gated:
        taken += len(item.gate.members)
        number[item.gate.digest] = taken
    return tuple(0 if slot.gate is None else number[slot.gate.digest] for slot in slots)


def _check_widths(vectors: Iterable[SteeringVector]) -> None:
    widths = sorted({vector.hidden_size for vector in vectors})
    if len(widths) > 1:
        raise ValueError(f"vectors of different widths cannot be added: {widths}")


def _check_range(terms: Sequence[Term]) -> None:
    """Raise `SteeringError` where the sum at a site may be too large, or a term is too small, to be computed with."""
    sizes = [abs(term.scale) * term.vector.max_abs for term in terms]
    most = sum(sizes)
    if most > MAX_VALUE and len(terms) > 1:  # terms may act at different sites
        at_sites: dict[Site, float] = {}
        for term, size in zip(terms, sizes, strict=True):
            for site in term.vector.sites:
                at_sites[site] = at_sites.get(site, 0.0) + size
        most = max(at_sites.values())
    if (fault := fault_of_range(most) or fault_of_range(min(sizes))) is not None:
        raise SteeringError("", fault)


def _merged(group: list[Term]) -> Term:
    try:
        scale = math.fsum(term.scale for term in group)  # exact: the order in which they were written is lost
    except OverflowError:
        scale = math.inf
    reference = next((term.reference for term in group if term.reference), None)
    return Term(group[0].vector, scale, reference, asked_by=frozenset().union(*(term.asked_by for term in group)))


def distinct(gates: Iterable[Condition]) -> list[Condition]:
    """Each gate once, in the order of their digests: the engine's own before an equal one, one with a name before one
    without."""
    by_digest: dict[bytes, Condition] = {}
    for gate in gates:
        known = by_digest.get(gate.digest)
        if known is None or gate.told > known.told:
            by_digest[gate.digest] = gate
    return [by_digest[digest] for digest in sorted(by_digest)]


def together(*ordered: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites of some tuples in forward order, in forward order. Mostly there is one tuple, and nothing to sort."""
    return ordered[0] if len(ordered) == 1 else tuple(sorted(set().union(*ordered), key=site_order))
