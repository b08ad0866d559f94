"""`rotate`: turns the stream within a plane and keeps its length (angular steering, arXiv:2510.26243).

    a = v / |v|,    b = the part of `plane` orthogonal to a, at unit length,    (p, q) = (y . a, y . b),    r = |(p, q)|
    `by`:    (p, q) -> (p cos t - q sin t, p sin t + q cos t)
    `to`:    (p, q) -> (r cos t, r sin t)

The angle t is in degrees, from `vector` towards `plane`: `to` 0 points the plane's part of every token along the
vector, 90 away from it, 180 against it. What is outside of the plane stays. `adaptive` turns only tokens with p > 0.
"""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, Slot
from trimtab.program.slots import Form
from trimtab.responses import TURN
from trimtab.spec.fields import Number, Source
from trimtab.spec.kinds.intervention import Intervention, Vectors, same_places
from trimtab.wording import summary


class Rotate(Intervention):
    """Turns the stream in the plane of two vectors, `by` an angle or `to` one; only where p > 0 if `adaptive`."""

    responses: ClassVar[tuple[str, ...]] = (TURN.name,)
    writes: ClassVar[bool] = True

    kind: Literal["rotate"] = "rotate"
    plane: Source
    by: Number | None = None
    to: Number | None = None
    adaptive: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _has_one_angle(self) -> Self:
        if self.by is not None and self.to is not None:
            raise SteeringError("to", "a token is turned `by` an angle or `to` one: give one of them")
        if self.by is None and self.to is None:
            raise SteeringError("", "has no angle: give `by` or `to`, in degrees")
        return self

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot, Slot]:
        """Two slots, one for each direction of the plane. Raises `SteeringError` below `path`."""
        first = self.direction(vectors, path)
        other = self.direction(vectors, path, "plane")
        same_places(first, other, path, "plane")
        parts, references = (*other.parts, *first.parts), (*other.references, *first.references)
        second = Direction(parts, references, Form.ORTHOGONAL)
        if parallel := second.zero_at:
            said = f"is parallel to `vector` at {summary([str(site) for site in parallel])}, so they span no plane"
            raise SteeringError(f"{path}.plane", said)
        if self.by is not None:
            cosine, sine = _on_circle(self.by)
            told = [(cosine - 1.0, -sine, 0.0), (cosine - 1.0, sine, 0.0)]
        else:
            assert self.to is not None
            told = [(-1.0, 0.0, part) for part in _on_circle(self.to)]
        slots = []
        for own, (way, beside) in enumerate(((first, second), (second, first))):
            numbers = Numbers.of(0.0, *told[own], (1.0 + own) * self.adaptive)
            each = tuple((site, numbers) for site in way.sites)
            slots.append(Slot(TURN.name, way, way, each, second=beside))
        return slots[0], slots[1]


def _on_circle(degrees: float) -> tuple[float, float]:
    """Cosine and sine; exact where they are whole numbers."""
    quarters, left = divmod(math.remainder(degrees, 360.0), 90.0)
    cosine, sine = math.cos(math.radians(left)), math.sin(math.radians(left))
    for _ in range(int(quarters) % 4):
        cosine, sine = -sine, cosine
    return cosine, sine
