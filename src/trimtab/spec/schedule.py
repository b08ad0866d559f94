"""How the strength of an intervention changes over the answer, as a request writes it.

    {"decay": 0.98}       times 0.98 for each token of the answer: 1 for the first, 0.98 for the second, ...
    {"ramp": [0, 8]}      rising over the tokens 0 to 7 of the answer, 1/8 to 1, and 1 behind them

The factor is that of the token's place in the answer, whichever of its tokens are selected. On a prompt it is 1.
"""

from typing import Annotated, Any, Self

from pydantic import (
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from trimtab.errors import SteeringError
from trimtab.program.schedules import LEAST_DECAY, LONGEST_RAMP
from trimtab.program.schedules import Schedule as Resolved
from trimtab.spec.base import Model
from trimtab.spec.fields import Number
from trimtab.wording import shown


def _ramp(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(type(edge) is not int for edge in value):
        raise SteeringError("", f"got {shown(value)}, want two places of the answer, as [0, 8]")
    first, end = value
    if not 0 <= first < end <= LONGEST_RAMP:
        raise SteeringError("", f"got {shown(value)}, want 0 <= first < end <= {LONGEST_RAMP}")
    return first, end


def _listed(ramp: tuple[int, int] | None) -> Any:
    return None if ramp is None else list(ramp)


class Schedule(Model):
    """A factor of each token of the answer: `decay` to the power of its place, or a `ramp` up to 1."""

    decay: Number | None = None
    ramp: Annotated[tuple[int, int] | None, PlainValidator(_ramp), PlainSerializer(_listed), WithJsonSchema({})] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.decay is None) == (self.ramp is None):
            raise SteeringError("", 'want one of {"decay": 0.98} and {"ramp": [0, 8]}')
        if self.decay is not None and not LEAST_DECAY <= self.decay <= 1.0:
            raise SteeringError("decay", f"got {self.decay:g}, want a number from 2^-64 to 1")
        return self

    @model_serializer(mode="wrap")
    def _dumped(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What reads back to it."""
        return {key: value for key, value in plain(self).items() if value is not None}

    @property
    def resolved(self) -> Resolved | None:
        """The numbers of the factor; None where it is 1 everywhere."""
        found = Resolved.ramp(*self.ramp) if self.ramp is not None else Resolved.decay(self.decay or 1.0)
        return None if found.is_one else found
