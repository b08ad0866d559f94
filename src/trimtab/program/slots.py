"""Slots: what every kind of intervention but adding comes down to.

    u = y . a + bias,    c = response(u),    z = y + c * w

y is the stream at the site once all that is added has been, a and w are directions. A slot acts so at each of its
sites, with numbers of its own at each. Slots that write along what they read are members of their site's set: see
`trimtab.program.slot_sets`.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from trimtab.program.resolved_gate import ResolvedGate, VectorReference
from trimtab.responses import RESPONSES
from trimtab.sites import Site, site_order
from trimtab.vectors.values import FloatArray
from trimtab.vectors.vector import SteeringVector


class Part(NamedTuple):
    """`weight` times a vector, taken at unit length at each of its sites where `unit`."""

    vector: SteeringVector
    weight: float = 1.0
    unit: bool = True


@dataclass(frozen=True)
class Direction:
    """What a slot reads or writes along: a sum of vectors that have the same sites. It is the content of a table row.

    `references` say how a process that holds the same vectors can be told of each.
    """

    parts: tuple[Part, ...]
    references: tuple[VectorReference | None, ...] = field(default=(), compare=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the direction is not nothing, in forward order."""
        return self.parts[0].vector.sites

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.parts[0].vector.hidden_size

    @cached_property
    def row_key(self) -> bytes:
        """Names the content of its table row."""
        content = b"".join(part.vector.digest + struct.pack("<d?", part.weight, part.unit) for part in self.parts)
        return hashlib.sha256(b"trimtab direction 1\0" + content).digest()

    @property
    def unit(self) -> float:
        """The power of two that `row` counts in, as of `PhaseProgram.unit`."""
        raise NotImplementedError

    def row(self, sites: Sequence[Site], out: FloatArray | None = None) -> FloatArray:
        """Float32 [len(sites), H] in units of `unit`; zero where the direction has no site. Taken in float64."""
        raise NotImplementedError


class Numbers(NamedTuple):
    """What a slot is told at one site, all of it rounded to float32: the bias of its score, and its response's own."""

    bias: float
    own: tuple[float, ...]  # in the order of `Response.numbers`; bounds may be infinite


@dataclass(frozen=True)
class Slot:
    """One slot. `read` None reads nothing, u = bias; `write` None writes along `read`, as a member of the set."""

    response: str  # a key of `RESPONSES`
    read: Direction | None
    write: Direction | None
    numbers: tuple[tuple[Site, Numbers], ...]  # in forward order: the sites at which it acts
    gate: ResolvedGate | None = None
    kind: str = field(default="", compare=False)  # what a request called it, for messages and reports

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts, in forward order."""
        return tuple(site for site, _ in self.numbers)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that it does; of its gate too."""
        whole = hashlib.sha256(b"trimtab slot 1\0" + struct.pack("<i", RESPONSES[self.response].code))
        for direction in (self.read, self.write):
            whole.update(b"-" if direction is None else direction.row_key)
        for site, numbers in self.numbers:
            whole.update(f"{site}\0".encode() + np.array([numbers.bias, *numbers.own], "<f4").tobytes())
        whole.update(b"" if self.gate is None else self.gate.digest)
        return whole.digest()


def in_forward_order(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sorted as a forward pass reaches them."""
    return tuple(sorted(sites, key=site_order))
