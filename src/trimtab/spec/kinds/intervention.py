"""What every kind of intervention says, and what each has to answer.

A kind is one file of this folder, with one subclass of `Intervention`, or of `Step` where it has no field `vector`: see
docs/kinds.md.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, Slot, Term, fault_of_range
from trimtab.program.ranges import MAX_VALUE
from trimtab.program.resolved_gate import VectorReference
from trimtab.program.slots import Part
from trimtab.responses import CLIP
from trimtab.sites import Site
from trimtab.spec.base import Model
from trimtab.spec.fields import ByLayer, Hooks, Layers, Source
from trimtab.spec.gate import Gate
from trimtab.spec.joint_gate import Condition
from trimtab.spec.schedule import Schedule
from trimtab.spec.where import WhereField
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import summary, with_suggestions


class Vectors(NamedTuple):
    """What interventions are lowered with: vectors by name, and the stream's median norm at sites, as the engine knows
    it."""

    by_name: Mapping[str, SteeringVector]
    norms: Mapping[Site, float]


class Needs(NamedTuple):
    """What the graphs of an engine have for what was declared at its start: responses, and whether slots may write
    along another direction than they read."""

    responses: tuple[str, ...]
    writes: bool = False


_PHASES = {
    "all": 'neither `prompt` nor `answer`, or both "all"',
    "prefill": '{"prompt": "all"}',
    "decode": '{"answer": "all"}',
}


class Step(Model):
    """What every kind of intervention says. `kind` tells them apart; each subclass fixes it.

    `responses` are those of its slots, of which it has none where it only adds; `writes` says whether a slot of it
    writes along another direction than it reads. Engines build their graphs for the kinds that they serve.
    """

    responses: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[bool] = False

    kind: str
    phase: Literal["all", "prefill", "decode"] = "all"
    layers: Layers | None = None
    hooks: Hooks | None = None
    gate: Condition = None
    where: WhereField = None
    schedule: Schedule | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_keeps_the_norm_is_the_request(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "keep_norm" in given:
            raise SteeringError("keep_norm", "belongs to all of a request: give it beside `interventions`")
        return given

    @model_validator(mode="after")
    def _phase_or_where(self) -> Self:
        if self.where is not None and "phase" in self.model_fields_set:
            part = _PHASES[self.phase]
            raise SteeringError("phase", f"cannot stand beside `where`, which says it as {part}: leave it out")
        return self

    @model_validator(mode="after")
    def _a_schedule_has_an_answer(self) -> Self:
        has_answer = self.phase != "prefill" if self.where is None else self.where.has_answer
        if self.schedule is not None and not has_answer:
            raise SteeringError("schedule", "is one of tokens of the answer, of which none is selected: leave it out")
        return self

    @property
    def is_placed(self) -> bool:
        """Whether it takes a prompt to know what its tokens receive."""
        return self.where is not None or self.schedule is not None

    @model_serializer(mode="wrap")
    def _dumped(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What reads back to it: of `phase` and `where` one."""
        dumped: dict[str, Any] = plain(self)
        dumped.pop("where" if self.where is None else "phase", None)
        if self.schedule is None:
            dumped.pop("schedule", None)
        return dumped

    @classmethod
    def declared(cls) -> dict[str, Needs]:
        """What engines declare for it, by name; nothing where it only adds."""
        name = str(cls.model_fields["kind"].default)
        return {name: Needs(cls.responses, cls.writes)} if cls.responses else {}

    @property
    def needs(self) -> str:
        """The name by which an engine must have declared this intervention, "" where it need not."""
        return self.kind if self.responses else ""

    def lower(self, vectors: Vectors, path: str) -> tuple[Term | Slot, ...]:
        """What this intervention comes down to, but for its gate; each kind has its own.

        Raises `SteeringError` below `path`, where the intervention stands in the request.
        """
        raise NotImplementedError

    @property
    def sources(self) -> dict[str, str | SteeringVector]:
        """The vectors that it is given, by the names of their fields: `to`, or `read[0]` where a field has several."""
        found: dict[str, str | SteeringVector] = {}
        for name, several in _sources_of(type(self)):
            given = getattr(self, name)
            found.update({f"{name}[{index}]": one for index, one in enumerate(given)} if several else {name: given})
        return found

    @property
    def gates(self) -> dict[str, Gate]:
        """The gates before it, each with one probe, by where they stand in it: `gate`, or `gate.all[0]`."""
        members = {} if self.gate is None else self.gate.members
        return {f"gate.{where}" if where else "gate": member for where, member in members.items()}

    def acting(
        self, vectors: Vectors, path: str, field: str = "vector"
    ) -> tuple[SteeringVector, VectorReference | None]:
        """The vector of a field where it acts, and the reference by which another process can be told of it.

        Raises `SteeringError` for an unknown name, and for `layers` and `hooks` at which it does not act.
        """
        given = self.sources[field]
        reference: VectorReference | None = None
        if isinstance(given, SteeringVector):
            vector = given
        elif (found := vectors.by_name.get(given)) is None:
            known = (
                f"registered are {summary(sorted(vectors.by_name))}" if vectors.by_name else "no vector is registered"
            )
            hint = with_suggestions(given, vectors.by_name)
            raise SteeringError(f"{path}.{field}", f"there is no vector {given!r}{hint}; {known}")
        else:
            vector = found
            reference = VectorReference(given, vector.digest, self.layers, hooks=self.hooks)
        try:
            return vector.acting(self.layers, self.hooks), reference
        except SteeringError as error:
            said = error.message if field == next(iter(self.sources)) else f"of {field!r}: {error.message}"
            raise SteeringError(f"{path}.{error.field}", said) from None

    def direction(self, vectors: Vectors, path: str, field: str = "vector") -> Direction:
        """The vector of a field at unit length. Raises `SteeringError` as `acting` does, and where it is zero."""
        vector, reference = self.acting(vectors, path, field)
        return _nowhere_zero(Direction((Part(vector),), (reference,)), f"{path}.{field}")

    def raw(self, vectors: Vectors, path: str, field: str) -> Direction:
        """The vector of a field, as long as it is. Raises `SteeringError` as `direction` does, and where it is out of
        range."""
        vector, reference = self.acting(vectors, path, field)
        if vector.max_abs and (fault := fault_of_range(vector.max_abs)) is not None:
            raise SteeringError(f"{path}.{field}", fault)
        return _nowhere_zero(Direction((Part(vector, unit=False),), (reference,)), f"{path}.{field}")

    def by_site(self, field: str, sites: Sequence[Site], path: str, absent: float = 0.0) -> list[float]:
        """The number of a field of type `Number` or `NumberOrByLayer` at each of `sites`; `absent` where it is None.

        Raises `SteeringError` where it lacks a layer of `sites`, has another, or holds what is out of range.
        """
        given: float | ByLayer | None = getattr(self, field)
        if given is None:
            return [absent] * len(sites)
        layers = sorted({site.layer for site in sites})
        numbers = dict(given.pairs) if isinstance(given, ByLayer) else dict.fromkeys(layers, given)
        if missing := [layer for layer in layers if layer not in numbers]:
            said = f"has no number for layer {missing[0]}: the vector acts at layers {summary(layers)}"
            raise SteeringError(f"{path}.{field}", said)
        for layer, number in numbers.items():
            place = f"{path}.{field}.{layer}" if isinstance(given, ByLayer) else f"{path}.{field}"
            if layer not in layers:
                raise SteeringError(place, f"the vector does not act at layer {layer}, but at {summary(layers)}")
            if abs(number) > MAX_VALUE:
                said = f"got {number:g}, beyond the {MAX_VALUE:g} that every model dtype can hold"
                raise SteeringError(place, said)
        return [numbers[site.layer] for site in sites]


class Intervention(Step):
    """An intervention of a kind that has a `vector`."""

    vector: Source


@cache
def _sources_of(kind: type[Step]) -> tuple[tuple[str, bool], ...]:
    """The fields that are vectors, and whether each has several."""
    one = str | SteeringVector
    several: dict[Any, bool] = {one: False, tuple[one, ...]: True}
    fields = kind.model_fields.items()
    return tuple((name, several[field.annotation]) for name, field in fields if field.annotation in several)


def _nowhere_zero(direction: Direction, path: str) -> Direction:
    if zero := direction.zero_at:
        raise SteeringError(path, f"is zero at {summary(zero)}, which is no direction; `layers` narrows a vector")
    return direction


def same_places(first: Direction, other: Direction, path: str, field: str, principal: str = "vector") -> None:
    """Raise `SteeringError` at `field` of `path` where `other`, which it gave, is not at the sites of `first`, which
    `principal` gave."""
    if first.hidden_size != other.hidden_size:
        said = f"has width {other.hidden_size}, but `{principal}` has {first.hidden_size}"
        raise SteeringError(f"{path}.{field}", said)
    if first.sites != other.sites:
        mine, theirs = (summary([str(site) for site in way.sites]) for way in (other, first))
        raise SteeringError(f"{path}.{field}", f"acts at {mine}, but `{principal}` at {theirs}")


def clip(
    read: Direction,
    strength: float,
    low: float = 0.0,
    high: float = 0.0,
    write: Direction | None = None,
) -> Slot:
    """A slot that moves the projection u of the stream on `read` by strength * (min(max(u, low), high) - u), at each
    site of `read`, or `write`s that much along another direction."""
    numbers = Numbers.of(0.0, strength, low, high)
    return Slot(CLIP.name, read, write, tuple((site, numbers) for site in read.sites))
