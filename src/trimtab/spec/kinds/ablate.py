"""`ablate`: takes the stream's part along a direction out (Arditi et al. 2024, arXiv:2406.11717).

    z = y - strength * (y . a) a,    a = v / |v|

`strength` 1 leaves nothing of it, less leaves a part, 2 reflects it. They ablate at every point that writes into the
stream; a vector with one site does so with `layers` and `hooks`. Not meant here: subtracting a vector (`add` with a
negative scale), which takes away the same from every token whether it was there or not.
"""

from typing import ClassVar, Literal

from trimtab.errors import SteeringError
from trimtab.program import Slot
from trimtab.responses import CLIP
from trimtab.spec.fields import Number
from trimtab.spec.kinds.intervention import Intervention, Vectors, clip


class Ablate(Intervention):
    """Takes `strength` times the stream's projection on the vector out, whatever the length of the vector."""

    responses: ClassVar[tuple[str, ...]] = (CLIP.name,)

    kind: Literal["ablate"] = "ablate"
    strength: Number = 1.0

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot]:
        """A clip to the interval [0, 0]. Raises `SteeringError` below `path`, for a `strength` outside [0, 2] too."""
        if not 0.0 <= self.strength <= 2.0:
            said = "1 takes all of the projection out, 2 reflects it; `scale` makes it larger"
            raise SteeringError(f"{path}.strength", f"got {self.strength:g}, want a number from 0 to 2: {said}")
        return (clip(self.direction(vectors, path), self.strength),)
