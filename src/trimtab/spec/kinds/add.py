"""`add`: adds a vector v at each of its sites (activation addition, Turner et al. 2023, arXiv:2308.10248).

    y = x + scale * v                                 "unit": "raw"
    y = x + scale * (median of |x|) * v / |v|         "unit": "dose"

A raw scale means nothing by itself: 1.5 may be a nudge in one model and noise in another. A dose is a length in units
of the stream's own: the median is that of the vector's metadata, taken where the vector was made.
"""

from dataclasses import replace
from typing import Literal

from trimtab.errors import SteeringError
from trimtab.program import Term, fault_of_range
from trimtab.program.resolved_gate import VectorReference
from trimtab.spec.fields import Number
from trimtab.spec.kinds.intervention import Intervention, Vectors
from trimtab.vectors.dose import stream_norm
from trimtab.vectors.vector import SteeringVector


class Add(Intervention):
    """Adds `scale` times the vector to the stream, at each of the sites at which the vector acts.

    With `unit` "dose" what is added is as long as `scale` times the stream's median vector, whatever the length of v.
    """

    kind: Literal["add"] = "add"
    scale: Number = 1.0
    unit: Literal["raw", "dose"] = "raw"

    def lower(self, vectors: Vectors, path: str) -> tuple[Term, ...]:
        """The vector and its scale; of a dose, those of each site. Raises `SteeringError` below `path`, for values out
        of range too."""
        vector, reference = self.acting(vectors, path)
        terms = self._doses(vector, reference, path) if self.unit == "dose" else (Term(vector, self.scale, reference),)
        for term in terms:
            value = term.vector.max_abs * abs(term.scale)
            if term.vector.max_abs and term.scale and (fault := fault_of_range(value)) is not None:
                by_scale = abs(self.scale) > 1.0 if value > 1.0 else abs(self.scale) < 1.0
                raise SteeringError(f"{path}.{'scale' if by_scale else 'vector'}", fault)
        return terms

    def _doses(self, vector: SteeringVector, reference: VectorReference | None, path: str) -> tuple[Term, ...]:
        """A term for each site, which has a scale of its own."""
        terms: list[Term] = []
        for site, length in vector.norms().items():
            if length == 0.0:
                said = f"is zero at {site}, which is no direction; `layers` narrows a vector"
                raise SteeringError(f"{path}.vector", said)
            if (norm := stream_norm(vector, site)) is None:
                said = f"'dose' needs the stream's median norm at {site}, and the vector's metadata do not have it: "
                said += "`trimtab extract` writes it into the file of a vector; or give the scale in `raw` units"
                raise SteeringError(f"{path}.unit", said)
            here = (site.layer,), (site.hook,)
            part = vector.at(here[0]).at_hooks(here[1])
            told = None if reference is None else replace(reference, layers=here[0], hooks=here[1])
            terms.append(Term(part, self.scale * norm / length, reference if part is vector else told))
        return tuple(terms)
