"""What a spec comes down to once its names are known: for each phase, a sum of vectors with their scales.

A program is canonical: two requests that add the same numbers have the same terms, the same row and the same identity,
however they were written. The engines receive nothing else of a request.

Tables hold rows in the model's dtype, and float16 knows no number between 0 and 6e-8. So a row is stored in units of a
power of two that brings its largest number just below the largest float16; tokens multiply the unit back in. Powers of
two cost no digit: what is stored differs from the sum by one rounding to the table's dtype, relative to the row's
largest number, however small or large the numbers of the request are.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate, VectorReference
from trimtab.sites import GateLimits, Phase, Site, site_order
from trimtab.vectors.values import FloatArray
from trimtab.vectors.vector import SteeringVector

MAX_VALUE = 65504.0  # the largest float16: whatever the model's dtype, its stream can hold what we let through
MIN_VALUE = 2.0**-110  # 7.7e-34: what adds less needs a coefficient below the smallest normal float32, 2**-126


@dataclass(frozen=True, slots=True)
class Term:
    """One vector, its scale, and the gate that it stands behind, if any.

    `reference` says how a process that holds the same vectors can be told of it.
    """

    vector: SteeringVector
    scale: float
    reference: VectorReference | None = field(default=None, compare=False)
    gate: ResolvedGate | None = None


@dataclass(frozen=True)
class PhaseProgram:
    """What is added to the tokens of one phase; build it with `PhaseProgram.of`.

    `terms` are added to every token, `gated` as far as a gate says. `row_key` names the content of the table row of
    `terms` (b"" = none: row 0), and a token receives that content times `factor`: a vector's scale, or 1 for a sum.
    `identity` is the hex digest of all of it ("" = unsteered) and hence of all that changes the token's KV cache.
    """

    terms: tuple[Term, ...]
    row_key: bytes
    factor: float
    identity: str
    gated: tuple["GatedProgram", ...] = ()

    @classmethod
    def of(cls, terms: Iterable[Term]) -> "PhaseProgram":
        """The canonical program: sorted by vector digest, equal vectors merged, what adds nothing dropped.

        One vector is its own row and its scale the factor, so that every scale of it shares one row; a sum has its
        scales inside the row. Terms behind equal gates are one gated sum, and gates of empty sums are dropped. Raises
        `ValueError` for vectors of different widths, `SteeringError` without a field for values out of range.
        """
        terms = list(terms)
        behind = [term for term in terms if term.gate is not None]
        plain = cls._ungated(term for term in terms if term.gate is None)
        if not behind:
            return plain
        gated = tuple(
            GatedProgram(gate, total)
            for gate in _distinct(term.gate for term in behind if term.gate is not None)
            if (total := cls._ungated(replace(term, gate=None) for term in behind if term.gate == gate)).terms
        )
        if not gated:
            return plain
        _check_range([*plain.terms, *(term for item in gated for term in item.total.terms)])
        widths = {term.vector.hidden_size for total in (plain, *(item.total for item in gated)) for term in total.terms}
        if len(widths) > 1:
            raise ValueError(f"vectors of different widths cannot be added: {sorted(widths)}")
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
            coefficient = factor * _unit(kept[0].vector.max_abs)
        else:
            widths = sorted({term.vector.hidden_size for term in kept})
            if len(widths) > 1:
                raise ValueError(f"vectors of different widths cannot be added: {widths}")
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
    def sites(self) -> tuple[Site, ...]:
        """The sites at which something is or may be added, in the order of the forward pass."""
        return _together(*{vector.sites for vector in self.vectors})

    @property
    def vectors(self) -> Iterator[SteeringVector]:
        """The vectors of all terms, in canonical order."""
        for total in (self, *(item.total for item in self.gated)):
            yield from (term.vector for term in total.terms)

    @property
    def unit(self) -> float:
        """The power of two that `row` counts in; `factor` times it is a normal number of float32.

        Of a sum it is computed from all of its numbers, at each call.
        """
        if len(self.terms) == 1:
            return _unit(self.terms[0].vector.max_abs)
        whole = self._content(_together(*{term.vector.sites for term in self.terms}))
        return max(_unit(float(np.abs(whole).max())), 2.0**-126)  # terms may cancel to less than `MIN_VALUE`

    @property
    def coefficient(self) -> float:
        """What a token multiplies `row` by, before it is rounded to float32; 0 where there is none."""
        return self.factor * self.unit if self.terms else 0.0

    def row(self, sites: Sequence[Site], out: FloatArray | None = None) -> FloatArray:
        """The content of this program's table row at `sites`, in units of `unit`: float32 [len(sites), H].

        It is zero where the program has no direction; a token that multiplies it by `coefficient` receives the sum.
        No number is larger than `MAX_VALUE`, and the largest, which may be at another site, is at least half of that.
        Sums are taken in float64 in canonical order and rounded once, so every rank composes the same bits. Writes to
        `out` if given. Raises `ValueError` for the empty program, which has no row.
        """
        if not self.terms:
            raise ValueError("the empty program has no row of its own: its tokens use row 0")
        shape = (len(sites), self.terms[0].vector.hidden_size)
        result = np.empty(shape, np.float32) if out is None else out
        if result.shape != shape:
            raise ValueError(f"out has shape {result.shape}, want {shape}")
        per_unit = np.float64(1.0 / self.unit)  # float64: it need not be a float32 number
        if len(self.terms) == 1 and tuple(sites) == self.terms[0].vector.sites:
            return np.multiply(self.terms[0].vector.block, per_unit, out=result, casting="same_kind")
        return np.multiply(self._content(sites), per_unit, out=result, casting="same_kind")

    def _content(self, sites: Sequence[Site]) -> npt.NDArray[np.float64]:
        """What a token receives for each unit of `factor`: float64 [len(sites), H]."""
        total = np.zeros((len(sites), self.terms[0].vector.hidden_size), np.float64)
        for term in self.terms:
            scale = np.float64(1.0 if len(self.terms) == 1 else term.scale)
            for position, site in enumerate(sites):
                if (direction := term.vector.directions.get(site)) is not None:
                    total[position] += direction * scale
        return total


@dataclass(frozen=True)
class GatedProgram:
    """The sum that one gate lets through, per token: `total` has terms and no gates of its own."""

    gate: ResolvedGate
    total: PhaseProgram


EMPTY = PhaseProgram((), b"", 0.0, "")


def fault_of_range(value: float) -> str | None:
    """What is wrong with a program whose largest number, not zero, is `value`; None if nothing is."""
    if not value <= MAX_VALUE:
        return f"values reach {value:g}, more than the {MAX_VALUE:g} that every model dtype can hold"
    if value < MIN_VALUE:
        return f"adds {value:g} at most, less than the {MIN_VALUE:.2g} that can be computed with: leave it out"
    return None


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


def _unit(largest: float) -> float:
    """The power of two by which a row with this largest number just fits into float16: to 65504, or half of it."""
    if not largest:
        return 1.0
    fraction, exponent = math.frexp(largest)
    return math.ldexp(1.0, exponent - (16 if fraction * 2.0**16 <= MAX_VALUE else 15))


def _merged(group: list[Term]) -> Term:
    try:
        scale = math.fsum(term.scale for term in group)  # exact: the order in which they were written is lost
    except OverflowError:
        scale = math.inf
    return Term(group[0].vector, scale, next((term.reference for term in group if term.reference), None))


def _distinct(gates: Iterable[ResolvedGate]) -> list[ResolvedGate]:
    """Each gate once, in the order of their digests: the engine's own before an equal one, one with a name before one
    without."""

    def named(gate: ResolvedGate) -> tuple[bool, bool, bool]:
        return gate.label == MONITOR_LABEL, gate.reference is not None, bool(gate.label)

    by_digest: dict[bytes, ResolvedGate] = {}
    for gate in gates:
        known = by_digest.get(gate.digest)
        if known is None or named(gate) > named(known):
            by_digest[gate.digest] = gate
    return [by_digest[digest] for digest in sorted(by_digest)]


class Origin(NamedTuple):
    """Content that a spec asked for, as reports name it.

    `digest` is that of the whole vector, before `layers` narrowed it, or of the probe, its bias included. `name` is the
    registered one, None for content that stood in the spec. `direction` is the digest of a probe's direction, b"" for a
    vector.
    """

    name: str | None
    digest: bytes
    direction: bytes = b""


SPANS = tuple(Phase)  # of a request's positions, in their order


@dataclass(frozen=True)
class ResolvedSteering:
    """A request's steering with every name resolved: a list of spans of its positions, and what each receives.

    There is one span for each `Phase`, in their order, and `programs` has its program. `vectors` and `probes` are the
    origins of what the spec asked for and the programs hold, in the order of the spec. They are no part of what is
    done, so they do not travel: a process that decodes steering does not know them.
    """

    programs: tuple[PhaseProgram, ...]
    vectors: tuple[Origin, ...] = field(default=(), compare=False)
    probes: tuple[Origin, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if len(self.programs) != len(Phase):
            raise ValueError(f"{len(self.programs)} programs; want one for each of {', '.join(Phase)}")

    @property
    def prefill(self) -> PhaseProgram:
        """The program of prompt tokens."""
        return self.program(Phase.PREFILL)

    @property
    def decode(self) -> PhaseProgram:
        """The program of the tokens that follow."""
        return self.program(Phase.DECODE)

    def program(self, phase: Phase) -> PhaseProgram:
        """The program of one phase."""
        return self.programs[SPANS.index(phase)]

    def identity(self, phase: Phase) -> str:
        """Hex digest of all that changes the KV of that phase's tokens; "" where they are not steered."""
        return self.program(Phase(phase)).identity

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which any program adds something, in the order of the forward pass."""
        return _together(*{program.sites for program in self.programs})

    @cached_property
    def gates(self) -> tuple[ResolvedGate, ...]:
        """The different gates of all programs, in canonical order."""
        return tuple(_distinct(item.gate for program in self.programs for item in program.gated))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of all programs, those behind gates too."""
        return tuple(term for program in self.programs for term in program.all_terms)

    def check_gate_count(self, limits: GateLimits, field: str) -> None:
        """Raise `SteeringError` at `field` where a phase has more gates than an engine with these limits serves."""
        own = b"" if limits.monitor is None else limits.monitor.digest
        most = max(sum(item.gate.digest != own for item in program.gated) for program in self.programs)
        if most > limits.count:
            raise SteeringError(
                field,
                f"has {most} different gates in one phase; this engine serves {limits.count} per request (its setting "
                "`gates`). Interventions with equal gates share one",
            )


def _together(*ordered: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites of some tuples in forward order, in forward order. Mostly there is one tuple, and nothing to sort."""
    return ordered[0] if len(ordered) == 1 else tuple(sorted(set().union(*ordered), key=site_order))
