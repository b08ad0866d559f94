"""`add`: adds a vector v at each of its sites (activation addition, Turner et al. 2023, arXiv:2308.10248).

    y = x + scale * v                                 "unit": "raw"
    y = x + scale * (median of |x|) * v / |v|         "unit": "dose"
    y = x + scale * |x| * v / |v|                     "unit": "norm"

A raw scale means nothing by itself: 1.5 may be a nudge in one model and noise in another. A dose is a length in units
of the stream's own: the median is that of the vector's metadata, taken where the vector was made, or else the one that
the engine was given at its start. `norm` takes each token's own length, as activation oracles do (arXiv:2512.15674); it
is a slot, which engines must have declared.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from trimtab.errors import SteeringError
from trimtab.program import Numbers, Slot, Term, fault_of_range
from trimtab.program.ranges import MAX_VALUE
from trimtab.program.resolved_gate import VectorReference
from trimtab.responses import NORM
from trimtab.sites import Site
from trimtab.spec.fields import Number
from trimtab.spec.kinds.intervention import Intervention, Needs, Vectors
from trimtab.vectors.dose import stream_norm, stream_norm_key
from trimtab.vectors.vector import SteeringVector

BY_NORM = "add:norm"
"""What engines declare for `add` with the unit `norm`."""


class Add(Intervention):
    """Adds `scale` times the vector to the stream, at each of the sites at which the vector acts.

    With `unit` "dose" what is added is as long as `scale` times the stream's median vector, with "norm" as `scale`
    times the token's own, whatever the length of v.
    """

    kind: Literal["add"] = "add"
    scale: Number = 1.0
    unit: Literal["raw", "norm", "dose"] = "raw"

    @classmethod
    def declared(cls) -> dict[str, Needs]:
        """What `norm` needs."""
        return {BY_NORM: Needs((NORM.name,), writes=True)}

    @property
    def needs(self) -> str:
        """Only `norm` must have been declared."""
        return BY_NORM if self.unit == "norm" else ""

    def lower(self, vectors: Vectors, path: str) -> tuple[Term | Slot, ...]:
        """The vector and its scale; of a dose, those of each site; of a norm, a slot. Raises `SteeringError` below
        `path`, for values out of range too."""
        if self.unit == "norm":
            return (self._by_norm(vectors, path),)
        vector, reference = self.acting(vectors, path)
        terms: tuple[Term, ...] = (Term(vector, self.scale, reference),)
        if self.unit == "dose":
            terms = self._doses(vector, reference, vectors.norms, path)
        for term in terms:
            value = term.vector.max_abs * abs(term.scale)
            if term.vector.max_abs and term.scale and (fault := fault_of_range(value)) is not None:
                by_scale = abs(self.scale) > 1.0 if value > 1.0 else abs(self.scale) < 1.0
                raise SteeringError(f"{path}.{'scale' if by_scale else 'vector'}", fault)
        return terms

    def _by_norm(self, vectors: Vectors, path: str) -> Slot:
        if abs(self.scale) > MAX_VALUE:
            said = f"got {self.scale:g} norms, want at most {MAX_VALUE:g}, or its negative"
            raise SteeringError(f"{path}.scale", said)
        along, numbers = self.direction(vectors, path), Numbers.of(0.0, self.scale)
        return Slot(NORM.name, None, along, tuple((site, numbers) for site in along.sites))

    def _doses(
        self, vector: SteeringVector, reference: VectorReference | None, norms: Mapping[Site, float], path: str
    ) -> tuple[Term, ...]:
        """A term for each site, which has a scale of its own; `norms` are for sites of which the vector says none."""
        terms: list[Term] = []
        for site, length in vector.norms().items():
            if length == 0.0:
                said = f"is zero at {site}, which is no direction; `layers` narrows a vector"
                raise SteeringError(f"{path}.vector", said)
            told_by_it = stream_norm_key(site) in vector.metadata.extra
            if (norm := stream_norm(vector, site) if told_by_it else norms.get(site)) is None:
                said = f"'dose' needs the stream's median norm at {site}, and the vector's metadata do not have it: "
                said += "`trimtab extract` writes it into the file of a vector, which --steering-norms (`norms`) gives "
                said += "an engine at its start for vectors without; or give the scale in `raw` units"
                raise SteeringError(f"{path}.unit", said)
            here = (site.layer,), (site.hook,)
            part = vector.at(here[0]).at_hooks(here[1])
            told = None if reference is None else replace(reference, layers=here[0], hooks=here[1])
            terms.append(Term(part, self.scale * norm / length, reference if part is vector else told))
        return tuple(terms)
