"""`swap`: writes along one direction what the stream had along another (concept replacement).

    z = y + (y . a) (b - a),    a = v / |v|,    b = t / |t|

for `vector` v and `to` t: as much of t comes in as there was of v, token by token. What the stream had along b before
stays beside it, so for orthogonal directions the projection on a is 0 afterwards, and that on b their sum.
"""

from typing import ClassVar, Literal

from trimtab.errors import SteeringError
from trimtab.program import Direction, Slot
from trimtab.program.slots import Part
from trimtab.responses import CLIP
from trimtab.spec.fields import Source
from trimtab.spec.kinds.intervention import Intervention, Vectors, clip, same_places
from trimtab.wording import summary


class Swap(Intervention):
    """Takes the stream's projection on the vector out and writes as much along `to`, whatever their lengths."""

    responses: ClassVar[tuple[str, ...]] = (CLIP.name,)
    writes: ClassVar[bool] = True

    kind: Literal["swap"] = "swap"
    to: Source

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot]:
        """A slot that reads `vector`, and writes `to` less `vector`. Raises `SteeringError` below `path`."""
        read, into = self.direction(vectors, path), self.direction(vectors, path, "to")
        same_places(read, into, path, "to")
        write = Direction(
            (*into.parts, *(Part(part.vector, -part.weight) for part in read.parts)), into.references + read.references
        )
        if same := write.zero_at:
            said = f"is the same direction as `vector` at {summary(same)}, so nothing would change"
            raise SteeringError(f"{path}.to", said)
        return (clip(read, -1.0, write=write),)
