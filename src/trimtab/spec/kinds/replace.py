"""`replace`: puts a vector in the stream's place, all of it or a part (activation patching; interchange, lerp).

    y = (1 - m) x + sum of m_k v_k,    m = sum of m_k <= 1,    m_k = amount_k * (what its gate lets through)

v is taken as long as it is. What is added comes on top of y, and all other kinds act on that. `amount` 1 leaves nothing
of what the model had there.
"""

from typing import ClassVar, Literal

from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, Slot, fault_of_range
from trimtab.program.slots import Part
from trimtab.responses import REPLACE
from trimtab.spec.fields import Number
from trimtab.spec.kinds.intervention import Intervention, Vectors


class Replace(Intervention):
    """Puts `amount` times the vector in the place of as much of the stream."""

    responses: ClassVar[tuple[str, ...]] = (REPLACE.name,)
    writes: ClassVar[bool] = True

    kind: Literal["replace"] = "replace"
    amount: Number = 1.0

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot]:
        """A slot that acts before all others. Raises `SteeringError` below `path`."""
        numbers = Numbers.of(0.0, self.amount)
        if not 0.0 < numbers.own[0] <= 1.0 or self.amount > 1.0:
            said = f"got {self.amount:g}, want more than 0 and at most 1: 1 leaves nothing of the stream"
            raise SteeringError(f"{path}.amount", said)
        vector, reference = self.acting(vectors, path)
        if vector.max_abs and (fault := fault_of_range(vector.max_abs)) is not None:
            raise SteeringError(f"{path}.vector", fault)
        along = Direction((Part(vector, unit=False),), (reference,))
        return (Slot(REPLACE.name, None, along, tuple((site, numbers) for site in along.sites)),)
