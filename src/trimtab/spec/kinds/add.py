"""`add`: x + scale * v at each site of a vector v (activation addition, Turner et al. 2023, arXiv:2308.10248)."""

from typing import Literal

from trimtab.errors import SteeringError
from trimtab.program import Term, fault_of_range
from trimtab.spec.fields import Number
from trimtab.spec.kinds.intervention import Intervention, Vectors


class Add(Intervention):
    """Adds `scale` times the vector to the stream, at each of the sites at which the vector acts."""

    kind: Literal["add"] = "add"
    scale: Number = 1.0

    def lower(self, vectors: Vectors, path: str) -> tuple[Term]:
        """The vector and its scale. Raises `SteeringError` below `path`, for values out of range too."""
        vector, reference = self.acting(vectors, path)
        value = vector.max_abs * abs(self.scale)
        if vector.max_abs and self.scale and (fault := fault_of_range(value)) is not None:
            by_scale = abs(self.scale) > 1.0 if value > 1.0 else abs(self.scale) < 1.0
            raise SteeringError(f"{path}.{'scale' if by_scale else 'vector'}", fault)
        return (Term(vector, self.scale, reference),)
