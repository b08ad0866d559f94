"""What every kind of intervention says, and what each has to answer."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator

from trimtab.errors import SteeringError
from trimtab.program import Term
from trimtab.program.resolved_gate import VectorReference
from trimtab.spec.base import Model, keys_are_text
from trimtab.spec.fields import Layers, Source
from trimtab.spec.gate import Gate
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import summary, with_suggestions


class Intervention(Model):
    """What every kind of intervention says. `kind` tells them apart; each subclass fixes it."""

    kind: str
    vector: Source
    phase: Literal["all", "prefill", "decode"] = "all"
    layers: Layers | None = None
    gate: Annotated[Gate | None, BeforeValidator(keys_are_text)] = None

    def term(self, vectors: Mapping[str, SteeringVector], path: str) -> Term:
        """What this intervention adds; each kind has its own. Raises `SteeringError` below `path`."""
        raise NotImplementedError

    def narrowed_vector(
        self, vectors: Mapping[str, SteeringVector], path: str
    ) -> tuple[SteeringVector, VectorReference | None]:
        """The vector at `layers` alone, and the reference by which another process can be told of it."""
        reference: VectorReference | None = None
        if isinstance(self.vector, SteeringVector):
            vector = self.vector
        elif (found := vectors.get(self.vector)) is None:
            known = f"registered are {summary(sorted(vectors))}" if vectors else "no vector is registered"
            hint = with_suggestions(self.vector, vectors)
            raise SteeringError(f"{path}.vector", f"there is no vector {self.vector!r}{hint}; {known}")
        else:
            vector = found
            reference = VectorReference(self.vector, vector.digest, self.layers)
        if self.layers is None:
            return vector, reference
        try:
            return vector.at(self.layers), reference
        except SteeringError as error:
            raise SteeringError(f"{path}.layers", error.message) from None
