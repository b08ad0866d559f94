"""The form in which a refusal leaves us: one that vLLM's servers answer with HTTP 400, in Python a `ValueError`."""

import functools
from collections.abc import Callable
from typing import NoReturn

from trimtab.errors import SteeringError


def refuse(error: SteeringError) -> NoReturn:
    """Raise `error` in the form that vLLM's servers answer with HTTP 400 and that is a `ValueError` in Python."""
    raise _refusal_class()(error) from error


@functools.cache
def _refusal_class() -> Callable[[SteeringError], Exception]:
    """vLLM's validation error and ours in one: its servers answer 400 with the field, Python callers see `ValueError`.

    In newer versions vLLM's is no `ValueError`, in older ones its text repeats the field.
    """
    from vllm.exceptions import VLLMValidationError

    class RefusedError(VLLMValidationError, SteeringError):  # type: ignore[misc]
        def __init__(self, error: SteeringError) -> None:
            Exception.__init__(self, str(error))
            self.field, self.message = error.field, error.message
            self.parameter, self.value = error.field, None

        def __str__(self) -> str:
            return str(self.args[0])

    return RefusedError
