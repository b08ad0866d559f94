"""`add`: x + scale * v at each site of a vector v (activation addition, Turner et al. 2023, arXiv:2308.10248)."""

from collections.abc import Mapping
from typing import Literal

from trimtab.errors import SteeringError
from trimtab.program import Term, fault_of_range
from trimtab.spec.fields import Number
from trimtab.spec.kinds.intervention import Intervention
from trimtab.vectors.vector import SteeringVector


class Add(Intervention):
    """Adds `scale` times the vector to the stream, at each of the vector's sites."""

    kind: Literal["add"] = "add"
    scale: Number = 1.0

    def term(self, vectors: Mapping[str, SteeringVector], path: str) -> Term:
        """The vector and its scale. Raises `SteeringError` for an unknown name or layer, values out of range."""
        vector, reference = self.narrowed_vector(vectors, path)
        value = vector.max_abs * abs(self.scale)
        if vector.max_abs and self.scale and (fault := fault_of_range(value)) is not None:
            by_scale = abs(self.scale) > 1.0 if value > 1.0 else abs(self.scale) < 1.0
            raise SteeringError(f"{path}.{'scale' if by_scale else 'vector'}", fault)
        return Term(vector, self.scale, reference)
