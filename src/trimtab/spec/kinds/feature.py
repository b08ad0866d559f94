"""`feature`: changes one feature of a sparse autoencoder, and keeps what the autoencoder does not explain.

    z = y + (target(f) - f) d,    f = u where u > theta, else 0

with d the feature's row of the decoder; how u and theta are made of its row of the encoder says
`trimtab.vectors.dictionary`. An autoencoder is linear behind its activations. So this is its answer with the feature
set, plus its error on y, and no other row of it is needed. Not meant here: putting the reconstruction in the stream's
place, which loses the error; adding a decoder row whatever the feature is (`add` with the row).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, Slot
from trimtab.program.ranges import MAX_VALUE, fault_of_range
from trimtab.program.slots import Part
from trimtab.responses import FEATURE
from trimtab.spec.fields import Number, Source
from trimtab.spec.kinds.intervention import Step, Vectors, same_places
from trimtab.vectors.dictionary import Dictionary, check_architecture
from trimtab.wording import summary

_NUMBERS = ("bias", "threshold", "gate_bias", "gain", "set", "scale", "add", "min", "max")


class Feature(Step):
    """Sets the activation of a feature, or scales, shifts and bounds it, on each token.

    Its row is given by its parts, or as `dictionary`, a `trimtab.Dictionary`, and `feature`, the name of a row of it.
    """

    responses: ClassVar[tuple[str, ...]] = (FEATURE.name,)
    writes: ClassVar[bool] = True

    kind: Literal["feature"] = "feature"
    encoder: Source
    decoder: Source
    architecture: str
    bias: Number = 0.0
    threshold: Number | None = None
    gate_bias: Number | None = None
    gain: Number | None = None
    set: Number | None = None
    scale: Number | None = None
    add: Number | None = None
    min: Number | None = None
    max: Number | None = None
    only_if_active: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="before")
    @classmethod
    def _row_of_dictionary(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not given.keys() & {"dictionary", "feature"}:
            return given
        said = dict(given)
        dictionary, name = said.pop("dictionary", None), said.pop("feature", None)
        if not isinstance(dictionary, Dictionary):
            found = f"got {type(dictionary).__name__}, want a trimtab.Dictionary" if dictionary else "is required"
            raise SteeringError("dictionary", f"{found}: without one, give `encoder`, `decoder` and `architecture`")
        if name is None:
            raise SteeringError("feature", f"is required: it names a row of {summary(sorted(dictionary))}")
        row = dictionary.fields_of(name)
        if twice := sorted(said.keys() & {*row, "bias", "threshold", "gate_bias", "gain"}):
            raise SteeringError(twice[0], "is that of the row of `dictionary`: leave it out")
        return {**row, **said}

    @model_validator(mode="after")
    def _is_one_feature_and_one_change(self) -> Self:
        check_architecture(self.architecture, self.threshold, self.gate_bias, self.gain)
        given = [name for name in ("scale", "add", "min", "max") if getattr(self, name) is not None]
        if self.set is not None and given:
            raise SteeringError(given[0], "has no meaning where the activation is `set`: give one of them")
        if self.set is None and not given:
            raise SteeringError("", "changes nothing: give `set`, or some of `scale`, `add`, `min` and `max`")
        return self

    def lower(self, vectors: Vectors, path: str) -> tuple[Slot]:
        """One slot. Raises `SteeringError` below `path`."""
        for name in _NUMBERS:
            if (value := getattr(self, name)) is not None and abs(value) > MAX_VALUE:
                raise SteeringError(f"{path}.{name}", f"got {value:g}, want at most {MAX_VALUE:g}, or its negative")
        low = -math.inf if self.min is None else self.min
        high = math.inf if self.max is None else self.max
        if low > high:
            raise SteeringError(f"{path}.min", f"is {low:g}, above `max`, which is {high:g}")
        read, write = self._encoder(vectors, path), self.raw(vectors, path, "decoder")
        same_places(read, write, path, "decoder", "encoder")
        scale, add = 1.0 if self.scale is None else self.scale, self.add or 0.0
        if self.set is not None:
            scale, add = 0.0, self.set
        off = 0.0 if self.only_if_active else min(max(add, low), high)  # where f is 0
        if self._least > MAX_VALUE:
            said = f"puts the threshold at {self._least:g}, beyond {MAX_VALUE:g}, so the feature would never fire"
            raise SteeringError(f"{path}.gate_bias", said)
        numbers = Numbers.of(self.bias, self._least, scale, add, low, high, off)
        return (Slot(FEATURE.name, read, write, tuple((site, numbers) for site in read.sites)),)

    @property
    def _least(self) -> float:
        """theta: the feature fires where u is above it."""
        if self.gate_bias is not None and self.gain is not None:
            return max(self.bias - self.gain * self.gate_bias, 0.0)
        return max(self.threshold or 0.0, 0.0)

    def _encoder(self, vectors: Vectors, path: str) -> Direction:
        """The row times the gain: with the bias it makes u."""
        own = self.raw(vectors, path, "encoder")
        if len(own.sites) > 1 and not own.is_spread:
            said = f"has rows at {summary([str(site) for site in own.sites])}, and one has the numbers of one feature: "
            raise SteeringError(f"{path}.encoder", f"{said}narrow it with `layers`, one intervention for each row")
        if self.gain is None:
            return own
        ((part,),) = (own.parts,)
        if (fault := fault_of_range(self.gain * part.vector.max_abs)) is not None:
            raise SteeringError(f"{path}.gain", f"times the row of the encoder {fault}")
        return Direction((Part(part.vector, self.gain, unit=False),), own.references)
