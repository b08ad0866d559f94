"""`clamp`: holds the stream's projection on a direction between bounds (activation capping, Lu et al. 2026,
arXiv:2601.10387, is `max` alone).

    u = y . a,    z = y + strength * (min(max(u, min), max) - u) a,    a = v / |v|

`value` is `min` and `max` at once. Bounds are in units of the stream, and one may differ from layer to layer. Inside
of its bounds a token is left as it is.
"""

import math
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from trimtab.errors import SteeringError
from trimtab.program import Numbers, Slot
from trimtab.responses import CLIP
from trimtab.sites import Site
from trimtab.spec.fields import ByLayer, Number, NumberOrByLayer
from trimtab.spec.kinds.intervention import Intervention, Vectors


class Clamp(Intervention):
    """Moves the stream's projection on the vector into [`min`, `max`], or to `value`, by `strength` of the way.

    Each bound is a number, or one per layer, {"14": 3.2, "15": 3.9}; one of `min` and `max` may be left out.
    """

    responses: ClassVar[tuple[str, ...]] = (CLIP.name,)

    kind: Literal["clamp"] = "clamp"
    min: NumberOrByLayer | None = None
    max: NumberOrByLayer | None = None
    value: NumberOrByLayer | None = None
    strength: Number = 1.0

    @model_validator(mode="after")
    def _has_bounds(self) -> Self:
        bounds = [bound for bound in (self.min, self.max) if bound is not None]
        if self.value is not None and bounds:
            raise SteeringError("value", "is `min` and `max` at once: give it, or them")
        if self.value is None and not bounds:
            raise SteeringError("", "has no bound, so it would do nothing: give `min`, `max` or `value`")
        return self

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot]:
        """A clip to the bounds of each site's layer. Raises `SteeringError` below `path`."""
        if not 0.0 <= self.strength <= 1.0:
            said = "1 moves a projection all the way to its bound"
            raise SteeringError(f"{path}.strength", f"got {self.strength:g}, want a number from 0 to 1: {said}")
        read = self.direction(vectors, path)
        lower, upper = ("min", "max") if self.value is None else ("value", "value")
        lows = self.by_site(lower, read.sites, path, -math.inf)
        highs = self.by_site(upper, read.sites, path, math.inf)
        numbers: list[tuple[Site, Numbers]] = []
        for site, low, high in zip(read.sites, lows, highs, strict=True):
            if low > high:
                at = f" at layer {site.layer}" if isinstance(self.min, ByLayer) or isinstance(self.max, ByLayer) else ""
                raise SteeringError(f"{path}.min", f"is {low:g}{at}, above `max`, which is {high:g}")
            numbers.append((site, Numbers.of(0.0, self.strength, low, high)))
        return (Slot(CLIP.name, read, None, tuple(numbers)),)
