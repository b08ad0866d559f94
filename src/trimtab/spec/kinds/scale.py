"""`scale`: multiplies the stream's projection on a direction (Neuronpedia's "orthogonal decomposition").

    z = y + (factor - 1) (y . a) a,    a = v / |v|

`factor` 0 is `ablate`, 1 changes nothing, -1 reflects. What is orthogonal to the direction stays.
"""

from typing import ClassVar, Literal

from trimtab.errors import SteeringError
from trimtab.program import Slot
from trimtab.program.ranges import MAX_VALUE
from trimtab.responses import CLIP
from trimtab.spec.fields import Number
from trimtab.spec.kinds.intervention import Intervention, Vectors, clip


class Scale(Intervention):
    """Multiplies the stream's projection on the vector by `factor`, whatever the length of the vector."""

    responses: ClassVar[tuple[str, ...]] = (CLIP.name,)

    kind: Literal["scale"] = "scale"
    factor: Number

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot]:
        """A clip to the interval [0, 0] of strength 1 - factor. Raises `SteeringError` below `path`."""
        if abs(1.0 - self.factor) > MAX_VALUE:
            said = f"got {self.factor:g}, want a number whose distance from 1 is at most {MAX_VALUE:g}"
            raise SteeringError(f"{path}.factor", said)
        return (clip(self.direction(vectors, path), 1.0 - self.factor),)
