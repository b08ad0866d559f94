"""What a spec comes down to once its names are known: for each phase, a sum of vectors with their scales.

A program is canonical: two requests that add the same numbers have the same terms, the same row and the same identity,
however they were written. The engines receive nothing else of a request.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from trimtab.errors import SteeringError
from trimtab.gates import ResolvedGate, VectorReference
from trimtab.sites import GateLimits, Phase, Site, site_order
from trimtab.vectors.values import FloatArray
from trimtab.vectors.vector import SteeringVector

MAX_VALUE = 65504.0  # the largest float16: whatever the model's dtype, a table row can hold what we let through


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
    `terms` (b"" = none: row 0), `coefficient` is the factor that each token applies to that row, `identity` is the hex
    digest of all of it ("" = unsteered) and hence of all that changes the token's KV cache.
    """

    terms: tuple[Term, ...]
    row_key: bytes
    coefficient: float
    identity: str
    gated: tuple["GatedProgram", ...] = ()

    @classmethod
    def of(cls, terms: Iterable[Term]) -> "PhaseProgram":
        """The canonical program: sorted by vector digest, equal vectors merged, what adds nothing dropped.

        One vector is its own row and its scale the coefficient, so that every scale of it shares one row; a sum has its
        scales inside the row. Terms behind equal gates are one gated sum, and gates of empty sums are dropped. Raises
        `ValueError` for vectors of different widths.
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
        widths = {term.vector.hidden_size for total in (plain, *(item.total for item in gated)) for term in total.terms}
        if len(widths) > 1:
            raise ValueError(f"vectors of different widths cannot be added: {sorted(widths)}")
        whole = b"trimtab gated program 1\0" + bytes.fromhex(plain.identity) + b"\0"
        whole += b"".join(item.gate.digest + bytes.fromhex(item.total.identity) for item in gated)
        return cls(plain.terms, plain.row_key, plain.coefficient, hashlib.sha256(whole).hexdigest(), gated)

    @classmethod
    def _ungated(cls, terms: Iterable[Term]) -> "PhaseProgram":
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
    def all_terms(self) -> Iterator[Term]:
        """The terms of every token and those behind gates, in canonical order."""
        yield from self.terms
        for item in self.gated:
            yield from (replace(term, gate=item.gate) for term in item.total.terms)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which something is or may be added, in the order of the forward pass."""
        return _together(*{term.vector.sites for term in self.all_terms})

    @property
    def bound(self) -> float:
        """No value that this program stores in its rows, or adds to the stream, is larger than this."""
        terms = list(self.all_terms)
        stored = max((term.vector.max_abs for term in terms), default=0.0)
        return max(stored, sum(abs(term.scale) * term.vector.max_abs for term in terms))

    def with_content_inline(self, known: Callable[[bytes], bool]) -> "PhaseProgram":
        """The same program, without references to content whose digest the receiver does not know."""

        def inline(terms: tuple[Term, ...]) -> tuple[Term, ...]:
            lacking = [term for term in terms if term.reference is not None and not known(term.reference.digest)]
            if not lacking:
                return terms
            return tuple(replace(term, reference=None) if term in lacking else term for term in terms)

        gated = []
        for item in self.gated:
            reference = item.gate.reference
            lacks = reference is not None and not known(reference.digest)
            gate = replace(item.gate, reference=None) if lacks else item.gate
            gated.append(GatedProgram(gate, replace(item.total, terms=inline(item.total.terms))))
        return replace(self, terms=inline(self.terms), gated=tuple(gated))

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


@dataclass(frozen=True)
class GatedProgram:
    """The sum that one gate lets through, per token: `total` has terms and no gates of its own."""

    gate: ResolvedGate
    total: PhaseProgram


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


def _distinct(gates: Iterable[ResolvedGate]) -> list[ResolvedGate]:
    """Each gate once, in the order of their digests; one that can be named before an equal one that cannot."""
    by_digest: dict[bytes, ResolvedGate] = {}
    for gate in gates:
        known = by_digest.get(gate.digest)
        if known is None or (known.reference is None and gate.reference is not None):
            by_digest[gate.digest] = gate
    return [by_digest[digest] for digest in sorted(by_digest)]


@dataclass(frozen=True)
class ResolvedSteering:
    """A request's steering with every name resolved: one program for prefill tokens, one for decode tokens.

    `monitor` is the hex digest of the engine's monitor, "" where it has none.
    """

    prefill: PhaseProgram
    decode: PhaseProgram
    monitor: str = ""

    def program(self, phase: Phase) -> PhaseProgram:
        """The program of one phase."""
        return self.prefill if phase == Phase.PREFILL else self.decode

    def identity(self, phase: Phase) -> str:
        """Hex digest of all that changes the KV of that phase's tokens; "" where they are not steered.

        A monitor acts on decode tokens alone, so behind one equal programs of both phases are not equal steering.
        """
        identity = self.program(Phase(phase)).identity
        if Phase(phase) == Phase.PREFILL or not self.monitored:
            return identity
        whole = b"trimtab monitored program 1\0" + bytes.fromhex(self.monitor) + bytes.fromhex(identity)
        return hashlib.sha256(whole).hexdigest()

    @property
    def monitored(self) -> bool:
        """Whether the engine's monitor acts on this: on what decode tokens receive behind no gate of its own."""
        return bool(self.monitor and self.decode.terms)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which either phase adds something, in the order of the forward pass."""
        return _together(*{self.prefill.sites, self.decode.sites})

    @cached_property
    def gates(self) -> tuple[ResolvedGate, ...]:
        """The different gates of both phases, in canonical order."""
        return tuple(_distinct(item.gate for program in (self.prefill, self.decode) for item in program.gated))

    def check_gate_count(self, limits: GateLimits, field: str) -> None:
        """Raise `SteeringError` at `field` where a phase has more gates than an engine with these limits serves."""
        most = max(len(self.prefill.gated), len(self.decode.gated))
        if most > limits.count:
            raise SteeringError(
                field,
                f"has {most} different gates in one phase; this engine serves {limits.count} per request (its setting "
                "`gates`). Interventions with equal gates share one",
            )

    def to_wire(self, *, views: bool = False) -> dict[str, Any]:
        """A plain dict for msgpack; see `trimtab.wire`.

        With `views`, content that no one can write to is not copied: it is a memoryview of the vector's own numbers,
        which msgpack takes as bytes too, but pickle and deepcopy do not.
        """
        from trimtab.wire import encode

        return encode(self, views)

    @staticmethod
    def from_wire(wire: Any, vectors_by_digest: Mapping[bytes, SteeringVector]) -> "ResolvedSteering":
        """The steering of a dict made by `to_wire`; raises `SteeringError` for anything else."""
        from trimtab.wire import decode

        return decode(wire, vectors_by_digest)


def _together(*ordered: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites of some tuples in forward order, in forward order. Mostly there is one tuple, and nothing to sort."""
    return ordered[0] if len(ordered) == 1 else tuple(sorted(set().union(*ordered), key=site_order))
