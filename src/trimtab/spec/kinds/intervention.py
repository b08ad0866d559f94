"""What every kind of intervention says, and what each has to answer.

A kind is one file of this folder, with one subclass of `Intervention`: see docs/kinds.md.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator

from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, Slot, Term
from trimtab.program.resolved_gate import VectorReference
from trimtab.program.slots import Part
from trimtab.responses import CLIP
from trimtab.spec.base import Model, keys_are_text
from trimtab.spec.fields import Hooks, Layers, Source
from trimtab.spec.gate import Gate
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import summary, with_suggestions

Vectors = Mapping[str, SteeringVector]  # by name


class Intervention(Model):
    """What every kind of intervention says. `kind` tells them apart; each subclass fixes it.

    `responses` are those of its slots, of which it has none where it only adds; `writes` says whether a slot of it
    writes along another direction than it reads. Engines build their graphs for the kinds that they serve.
    """

    responses: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[bool] = False

    kind: str
    vector: Source
    phase: Literal["all", "prefill", "decode"] = "all"
    layers: Layers | None = None
    hooks: Hooks | None = None
    gate: Annotated[Gate | None, BeforeValidator(keys_are_text)] = None

    def lower(self, vectors: Vectors, path: str) -> tuple[Term | Slot, ...]:
        """What this intervention comes down to, but for its gate; each kind has its own.

        Raises `SteeringError` below `path`, where the intervention stands in the request.
        """
        raise NotImplementedError

    @property
    def sources(self) -> dict[str, str | SteeringVector]:
        """The vectors that it is given, by the names of their fields."""
        return {name: getattr(self, name) for name in _sources_of(type(self))}

    def acting(
        self, vectors: Vectors, path: str, field: str = "vector"
    ) -> tuple[SteeringVector, VectorReference | None]:
        """The vector of a field where it acts, and the reference by which another process can be told of it.

        Raises `SteeringError` for an unknown name, and for `layers` and `hooks` at which it does not act.
        """
        given: str | SteeringVector = getattr(self, field)
        reference: VectorReference | None = None
        if isinstance(given, SteeringVector):
            vector = given
        elif (found := vectors.get(given)) is None:
            known = f"registered are {summary(sorted(vectors))}" if vectors else "no vector is registered"
            hint = with_suggestions(given, vectors)
            raise SteeringError(f"{path}.{field}", f"there is no vector {given!r}{hint}; {known}")
        else:
            vector = found
            reference = VectorReference(given, vector.digest, self.layers, hooks=self.hooks)
        try:
            return vector.acting(self.layers, self.hooks), reference
        except SteeringError as error:
            said = error.message if field == "vector" else f"of {field!r}: {error.message}"
            raise SteeringError(f"{path}.{error.field}", said) from None

    def direction(self, vectors: Vectors, path: str, field: str = "vector") -> Direction:
        """The vector of a field at unit length. Raises `SteeringError` as `acting` does, and where it is zero."""
        vector, reference = self.acting(vectors, path, field)
        direction = Direction((Part(vector),), (reference,))
        if zero := direction.zero_at:
            raise SteeringError(
                f"{path}.{field}", f"is zero at {summary(zero)}, which is no direction; `layers` narrows a vector"
            )
        return direction


@cache
def _sources_of(kind: type[Intervention]) -> tuple[str, ...]:
    return tuple(name for name, field in kind.model_fields.items() if field.annotation == str | SteeringVector)


def same_places(first: Direction, other: Direction, path: str, field: str) -> None:
    """Raise `SteeringError` at `field` of `path` where `other`, which it gave, is not at the sites of `vector`."""
    if first.hidden_size != other.hidden_size:
        said = f"has width {other.hidden_size}, but `vector` has {first.hidden_size}"
        raise SteeringError(f"{path}.{field}", said)
    if first.sites != other.sites:
        mine, theirs = (summary([str(site) for site in way.sites]) for way in (other, first))
        raise SteeringError(f"{path}.{field}", f"acts at {mine}, but `vector` at {theirs}")


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
