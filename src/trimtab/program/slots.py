"""Slots: what every kind of intervention but adding comes down to.

    u = y . a + bias,    c = response(u),    z = y + c * w

y is the stream at the site once all that is added has been, a and w are directions. A slot acts so at each of its
sites, with numbers of its own at each. Some responses see a second score, which another slot of the program reads.
Slots that write along what they read are members of their site's set: see `trimtab.program.slot_sets`.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.program.digits import digits, share
from trimtab.program.joint_gate import Condition
from trimtab.program.ranges import unit_of
from trimtab.program.resolved_gate import VectorReference
from trimtab.recent import Recent
from trimtab.responses import FLOAT32_ROWS, RESPONSES, Stage
from trimtab.sites import Site
from trimtab.vectors.values import FloatArray
from trimtab.vectors.vector import SteeringVector

NOTHING = 1e-6
"""The length of a sum of unit vectors that is their rounding: vectors are given in float32."""


class Form(StrEnum):
    """What a direction is of its parts."""

    SUM = "sum"
    ORTHOGONAL = "orthogonal"  # the first of two less what it has along the second, at unit length


class _Known(NamedTuple):
    """What a direction's numbers come to, which follows from its row key."""

    unit: float
    zero_at: tuple[Site, ...]


_KNOWN: Recent[_Known] = Recent(1 << 14, 4 << 20)
"""By row key, and whether it is spread: requests make their directions anew, of vectors that mostly came before."""

AT_ONCE = 1 << 15  # numbers in float64 that a processor's cache holds: directions are looked at a few sites at a time


class Part(NamedTuple):
    """`weight` times a vector, taken at unit length at each of its sites where `unit`."""

    vector: SteeringVector
    weight: float = 1.0
    unit: bool = True


@dataclass(frozen=True)
class Direction:
    """What a slot reads or writes along, made of vectors that have the same sites. It is the content of a table row.

    `references` say how a process that holds the same vectors can be told of each.
    """

    parts: tuple[Part, ...]
    references: tuple[VectorReference | None, ...] = field(default=(), compare=False)
    form: Form = Form.SUM
    place: int | None = None  # which of the rows it is that hold the whole to the digits of float32 (`program.digits`)

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
        form = b"" if self.form is Form.SUM else self.form.encode() + b"\0"
        form += b"" if self.place is None else b"digits %d\0" % self.place
        return hashlib.sha256(b"trimtab direction 1\0" + form + content).digest()

    @property
    def told(self) -> Iterator[tuple[Part, VectorReference | None]]:
        """Its parts with their references."""
        return zip(self.parts, self.references or (None,) * len(self.parts), strict=True)

    @property
    def names(self) -> str:
        """What to call it in messages: the names of its vectors, or the first digits of their digests."""
        return " and ".join(
            repr(reference.name) if reference is not None else f"the vector {part.vector.digest.hex()[:12]}"
            for part, reference in self.told
        )

    @property
    def unit(self) -> float:
        """The power of two that `row` counts in, as of `PhaseProgram.unit`; of rows of digits as the first one needs,
        whose largest number may be rounded up."""
        return share(self.place) * replace(self, place=0).unit if self.place else self._known.unit

    @property
    def is_spread(self) -> bool:
        """Whether it is one row at all of its sites."""
        return all(part.vector.is_spread for part in self.parts)

    @property
    def zero_at(self) -> Sequence[Site]:
        """The sites at which it is no direction, zero but for rounding; the first of them where it is spread."""
        return self._known.zero_at

    @cached_property
    def _known(self) -> _Known:
        key = (self.row_key, self.is_spread)
        known = _KNOWN.get(key)
        if known is None:
            largest, zero = 0.0, []
            nothing = NOTHING if any(part.unit for part in self.parts) else 0.0
            for sites in a_few(self._different, self.hidden_size):
                values = self._values(sites)
                largest = max(largest, float(np.abs(values).max()))
                lengths = np.linalg.norm(values, axis=1)
                zero += [site for site, length in zip(sites, lengths, strict=True) if length <= nothing]
            known = _Known(max(unit_of(largest), 2.0**-126), tuple(zero))  # float32 knows nothing smaller
            _KNOWN.put(key, known, 64 * len(zero))
        return known

    def values(self, sites: Sequence[Site]) -> npt.NDArray[np.float64]:
        """Float64 [len(sites), H]: the direction itself, zero where it has no site. Not to be written to."""
        if len(sites) > 1 and self.is_spread and set(sites).issubset(self.sites):
            return np.broadcast_to(self._values(sites[:1]), (len(sites), self.hidden_size))
        return self._values(sites)

    @property
    def _different(self) -> tuple[Site, ...]:
        """The sites that tell of all of its rows."""
        return self.sites[:1] if self.is_spread else self.sites

    def _values(self, sites: Sequence[Site]) -> npt.NDArray[np.float64]:
        first, *others = (self._part(part, sites) for part in self.parts)
        if self.form is Form.ORTHOGONAL:
            assert self.place is None, "what is read to more digits than a table has is given as it is"
            (second,) = others
            left = first - (first * second).sum(axis=1, keepdims=True) * second
            return np.where(np.linalg.norm(left, axis=1, keepdims=True) < NOTHING, 0.0, _at_unit_length(left))
        for other in others:
            first += other
        return first if self.place is None else digits(first, self.place)

    def _part(self, part: Part, sites: Sequence[Site]) -> npt.NDArray[np.float64]:
        result = np.zeros((len(sites), self.hidden_size))
        held = {site: index for index, site in enumerate(part.vector.sites)}
        into = [index for index, site in enumerate(sites) if site in held]
        rows = part.vector.block[[held[sites[index]] for index in into]].astype(np.float64)
        result[into] = part.weight * (_at_unit_length(rows) if part.unit else rows)
        return result

    def row(self, sites: Sequence[Site], out: FloatArray | None = None) -> FloatArray:
        """The content of its table row at `sites`, in units of `unit`: float32 [len(sites), H].

        Taken in float64 and rounded once, so every rank composes the same bits. Zero where the direction has no site.
        Writes to `out` if given.
        """
        result = np.empty((len(sites), self.hidden_size), np.float32) if out is None else out
        return np.multiply(self.values(sites), 1.0 / self.unit, out=result, casting="same_kind")


def a_few(sites: Sequence[Site], numbers: int) -> Iterator[Sequence[Site]]:
    """The sites in groups of as many as take `AT_ONCE` numbers, of which one site has so many."""
    size = max(1, AT_ONCE // numbers)
    return (sites[start : start + size] for start in range(0, len(sites), size))


def _at_unit_length(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = rows / np.where(lengths == 0.0, 1.0, lengths)
    return result


class Numbers(NamedTuple):
    """What a slot is told at one site, all of it rounded to float32: the bias of its score, and its response's own."""

    bias: float
    own: tuple[float, ...]  # in the order of `Response.numbers`; bounds may be infinite

    @classmethod
    def of(cls, bias: float, *own: float) -> "Numbers":
        """These numbers rounded to float32; -0 is 0."""
        with np.errstate(over="ignore"):
            rounded = [float(number) + 0.0 for number in np.array([bias, *own], np.float32)]
        return cls(rounded[0], tuple(rounded[1:]))


@dataclass(frozen=True)
class Slot:
    """One slot. `read` None reads nothing, u = bias; `write` None writes along `read`, as a member of the set.

    `second` is the direction of the second score, where the response sees one: another slot of the program reads it.
    """

    response: str  # a key of `RESPONSES`
    read: Direction | None
    write: Direction | None
    numbers: tuple[tuple[Site, Numbers], ...]  # in forward order: the sites at which it acts
    gate: Condition | None = None
    kind: str = field(default="", compare=False)  # what a request called it, for messages and reports
    path: str = field(default="", compare=False)  # where a request asked for it
    second: Direction | None = None
    asked_by: frozenset[int] = field(default=frozenset(), compare=False)  # interventions of a spec, by their index

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it acts, in forward order."""
        return tuple(site for site, _ in self.numbers)

    @property
    def is_member(self) -> bool:
        """Whether it is a member of the set at each of its sites."""
        return self.write is None and self.read is not None

    @property
    def directions(self) -> tuple[Direction, ...]:
        """What it reads along and what it writes along, as far as it has either."""
        return tuple(direction for direction in (self.read, self.write) if direction is not None)

    @cached_property
    def columns(self) -> tuple[Direction | None, ...]:
        """What the table rows hold that its record names, in the order of `SlotOpArgs.slot_rows`."""
        if self.read is None or not RESPONSES[self.response].reads_float32:
            return self.read, self.write
        first, *others = (replace(self.read, place=place) for place in range(FLOAT32_ROWS))
        return first, self.write, *others

    @cached_property
    def rows(self) -> tuple[Direction, ...]:
        """The same without gaps."""
        return tuple(way for way in self.columns if way is not None)

    @property
    def vectors(self) -> tuple[SteeringVector, ...]:
        """The vectors of its directions."""
        return tuple(part.vector for direction in self.directions for part in direction.parts)

    @property
    def stage(self) -> Stage:
        """When it acts."""
        return RESPONSES[self.response].stage

    @property
    def hidden_size(self) -> int:
        """H; 0 where it has no direction."""
        return max((way.hidden_size for way in self.directions), default=0)

    @cached_property
    def at(self) -> dict[Site, Numbers]:
        """Its numbers by site."""
        return dict(self.numbers)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that it does; of its gate too."""
        whole = hashlib.sha256(b"trimtab slot 1\0" + struct.pack("<i", RESPONSES[self.response].code))
        for direction in (self.read, self.write):
            whole.update(b"-" if direction is None else direction.row_key)
        packed = {id(numbers): numbers for _, numbers in self.numbers}  # mostly all sites share one
        told = {key: np.array([own.bias, *own.own], "<f4").tobytes() for key, own in packed.items()}
        whole.update(b"".join(f"{site}\0".encode() + told[id(numbers)] for site, numbers in self.numbers))
        whole.update(b"" if self.gate is None else self.gate.digest)
        whole.update(b"" if self.second is None else b"second\0" + self.second.row_key)
        return whole.digest()


def counted(slots: Iterable[Slot]) -> Counter[Site]:
    """How many of the slots act at each site, of all sites at which any does."""
    return Counter(site for slot in slots for site in slot.sites)


def measured_slots(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Those of a program's slots of which reports tell, in their order: equal ones do the same, and are told of once;
    what keeps norms has no number."""
    return tuple({slot.digest: slot for slot in slots if slot.stage is not Stage.LAST}.values())


def place_of_second(slot: Slot, acting: Sequence[Slot], site: Site) -> int:
    """Which of the slots `acting` at `site` reads the second score of `slot`. Raises `SteeringError` if none does."""
    assert slot.second is not None, "its response sees one score"
    for place, other in enumerate(acting):
        if other.read == slot.second and other.at[site].bias == 0.0:
            return place
    raise SteeringError("", f"no slot at {site} reads the second score of one with the response {slot.response!r}")


def check_seconds(slots: Sequence[Slot]) -> None:
    """Raise `SteeringError` where the response of one of a program's slots sees a score that no slot reads."""
    for slot in slots:
        if (slot.second is not None) != RESPONSES[slot.response].sees_two:
            raise SteeringError("", f"the response {slot.response!r} sees another number of scores than the slot has")
        for site in slot.sites if slot.second is not None else ():
            place_of_second(slot, [other for other in slots if site in other.at], site)
