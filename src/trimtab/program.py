"""What a spec comes down to once its names are known: for each phase, a sum of vectors with their scales.

A program is canonical: two requests that add the same numbers have the same terms, the same row and the same identity,
however they were written. The engines receive nothing else of a request.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from trimtab.errors import SteeringError
from trimtab.sites import Phase, Site, site_order
from trimtab.vectors.values import FloatArray
from trimtab.vectors.vector import SteeringVector

MAX_VALUE = 65504.0  # the largest float16: whatever the model's dtype, a table row can hold what we let through


@dataclass(frozen=True)
class VectorReference:
    """How a vector can be named instead of sent: a registered vector, narrowed to `layers` if any are given."""

    name: str
    digest: bytes
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Term:
    """One vector and its scale. `reference` says how a process that holds the same vectors can be told of it."""

    vector: SteeringVector
    scale: float
    reference: VectorReference | None = field(default=None, compare=False)


@dataclass(frozen=True)
class PhaseProgram:
    """What is added to every token of one phase; build it with `PhaseProgram.of`.

    `row_key` names the content of its table row (b"" = nothing to add: row 0), `coefficient` is the factor that each
    token applies to that row, `identity` is the hex digest of both ("" = unsteered) and hence of all that changes the
    token's KV cache.
    """

    terms: tuple[Term, ...]
    row_key: bytes
    coefficient: float
    identity: str

    @classmethod
    def of(cls, terms: Iterable[Term]) -> "PhaseProgram":
        """The canonical program: sorted by vector digest, equal vectors merged, what adds nothing dropped.

        One vector is its own row and its scale the coefficient, so that every scale of it shares one row; a sum has its
        scales inside the row. Raises `ValueError` for vectors of different widths.
        """
        groups: dict[bytes, list[Term]] = {}
        for term in terms:
            groups.setdefault(term.vector.digest, []).append(term)
        kept = [group[0] if len(group) == 1 else _merged(group) for _, group in sorted(groups.items())]
        kept = [term for term in kept if float(np.float32(term.scale)) != 0.0 and term.vector.max_abs != 0.0]
        if not kept:
            return EMPTY
        if len(kept) == 1:
            row_key, coefficient = kept[0].vector.digest, float(np.float32(kept[0].scale))
        else:
            widths = sorted({term.vector.hidden_size for term in kept})
            if len(widths) > 1:
                raise ValueError(f"vectors of different widths cannot be added: {widths}")
            content = b"".join(term.vector.digest + struct.pack("<d", term.scale) for term in kept)
            row_key, coefficient = hashlib.sha256(b"trimtab row 1\0" + content).digest(), 1.0
        whole = b"trimtab program 1\0" + row_key + struct.pack("<f", coefficient)
        return cls(tuple(kept), row_key, coefficient, hashlib.sha256(whole).hexdigest())

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which something is added, in the order of the forward pass."""
        return tuple(sorted({site for term in self.terms for site in term.vector.sites}, key=site_order))

    @property
    def bound(self) -> float:
        """No value that this program stores in its row, or adds to the stream, is larger than this."""
        stored = max((term.vector.max_abs for term in self.terms), default=0.0)
        return max(stored, sum(abs(term.scale) * term.vector.max_abs for term in self.terms))

    def row(self, sites: Sequence[Site], out: FloatArray | None = None) -> FloatArray:
        """The content of this program's table row at `sites`: float32 [len(sites), H], zero where it has no direction.

        Sums are taken in float64 in canonical order and rounded once, so every rank composes the same bits. The
        coefficient is not in it. Writes to `out` if given. Raises `ValueError` for the empty program, which has no row.
        """
        if not self.terms:
            raise ValueError("the empty program has no row of its own: its tokens use row 0")
        shape = (len(sites), self.terms[0].vector.hidden_size)
        result = np.empty(shape, np.float32) if out is None else out
        if result.shape != shape:
            raise ValueError(f"out has shape {result.shape}, want {shape}")
        if len(self.terms) == 1:
            vector = self.terms[0].vector
            if tuple(sites) == vector.sites:
                result[:] = vector.block
                return result
            for position, site in enumerate(sites):
                result[position] = vector.directions.get(site, 0.0)
            return result
        total = np.zeros(shape, np.float64)
        for term in self.terms:
            for position, site in enumerate(sites):
                if (direction := term.vector.directions.get(site)) is not None:
                    total[position] += direction * np.float64(term.scale)
        result[:] = total
        return result


EMPTY = PhaseProgram((), b"", 0.0, "")


def checked(program: PhaseProgram, field: str) -> PhaseProgram:
    """The program itself, or a `SteeringError` at `field` where its values exceed `MAX_VALUE`."""
    if program.bound > MAX_VALUE:
        raise SteeringError(field, out_of_range(program.bound))
    return program


def out_of_range(largest: float) -> str:
    """The message for values beyond `MAX_VALUE`."""
    return f"values reach {largest:g}, more than the {MAX_VALUE:g} that every model dtype can hold"


def _merged(group: list[Term]) -> Term:
    scale = math.fsum(term.scale for term in group)  # exact, so that the order in which they were written is lost
    return Term(group[0].vector, scale, next((term.reference for term in group if term.reference), None))


@dataclass(frozen=True)
class ResolvedSteering:
    """A request's steering with every name resolved: one program for prefill tokens, one for decode tokens."""

    prefill: PhaseProgram
    decode: PhaseProgram

    def program(self, phase: Phase) -> PhaseProgram:
        """The program of one phase."""
        return self.prefill if phase == Phase.PREFILL else self.decode

    def identity(self, phase: Phase) -> str:
        """Hex digest of all that changes the KV of that phase's tokens; "" where they are not steered."""
        return self.program(Phase(phase)).identity

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites used in either phase, in the order of the forward pass."""
        return tuple(sorted({*self.prefill.sites, *self.decode.sites}, key=site_order))

    def to_wire(self) -> dict[str, Any]:
        """A plain dict for msgpack; see `trimtab.wire`."""
        from trimtab.wire import encode

        return encode(self)

    @staticmethod
    def from_wire(wire: Any, vectors_by_digest: Mapping[bytes, SteeringVector]) -> "ResolvedSteering":
        """The steering of a dict made by `to_wire`; raises `SteeringError` for anything else."""
        from trimtab.wire import decode

        return decode(wire, vectors_by_digest)
