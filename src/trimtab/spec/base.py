"""What all objects within a spec have in common: frozen, no unknown keys, and faults told by the caller's own path."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.errors import SteeringError
from trimtab.spec.faults import join, translate
from trimtab.wording import shown


class Model(BaseModel):
    """One object of a spec. Raises `SteeringError` for what is wrong in form."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    def __init__(self, /, **data: Any) -> None:  # by position alone: a caller's object may have any key, "self" too
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise translate(error, type(self)) from None


def keys_are_text(value: Any) -> Any:
    """An object within a spec is handed to its model key by key, which works for text alone."""
    if isinstance(value, Mapping) and (other := [key for key in value if not isinstance(key, str)]):
        raise SteeringError("", f"has the key {shown(other[0])}, a {type(other[0]).__name__}; keys are text")
    return value


@contextmanager
def below(path: str) -> Iterator[None]:
    """Faults found within are told as faults below `path`."""
    try:
        yield
    except SteeringError as error:
        raise type(error)(join(path, error.field), error.message) from None


class NowhereError(SteeringError):
    """Refuses what selects no token of a prompt or its answer. A server's default may do so, and then does nothing."""
