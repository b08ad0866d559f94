"""What happens at the doors of vLLM's front end: a request's spec is found, admitted, and replaced by its wire form.

`compat_frontend` and `compat_http` put these functions into vLLM; this module says what they do.
"""

import copy
import functools
import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NoReturn

from trimtab.engines.vllm.frontend import FIELD, Admission, FrontEnd
from trimtab.engines.vllm.wire import AdmittedWire
from trimtab.errors import SteeringError


class Exchange:
    """One HTTP request while it is being answered: where it came in, and what admission made of it."""

    __slots__ = ("admission", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.admission: Admission | None = None


exchange: ContextVar[Exchange | None] = ContextVar("trimtab_exchange", default=None)

# The spec of an HTTP request whose own model has no place for it, on its way to the handler behind.
forwarded: ContextVar[Any] = ContextVar("trimtab_forwarded", default=None)

# The routes that steer what they answer, for messages; `guard` has all that take a spec.
ANSWERING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate")

_current: FrontEnd | None = None

_gate_reporter: Callable[[str], Awaitable[list[dict[str, Any]]]] | None = None


def current_front_end() -> FrontEnd | None:
    """The front end of this process's engine, the latest one made; None where steering is off."""
    return _current


def set_current_front_end(front_end: FrontEnd | None) -> None:
    """Make `front_end` the one that HTTP requests of this process meet."""
    global _current
    _current = front_end


def set_gate_reporter(reporter: Callable[[str], Awaitable[list[dict[str, Any]]]]) -> None:
    """Let `receipt_of` ask the workers of this process's engine what a request's gates did."""
    global _gate_reporter
    _gate_reporter = reporter


async def receipt_of(admission: Admission, request_id: str) -> dict[str, Any]:
    """The receipt of a finished request: that of its admission, and what its gates did where it had any."""
    if not admission.resolved.gates or _gate_reporter is None:
        return admission.receipt
    return {**admission.receipt, "gates": await _gate_reporter(request_id)}


def given_by(request: Any) -> Any:
    """What an HTTP request says as `steering`: at the top of its body, or in `vllm_xargs`."""
    top = (request.model_extra or {}).get(FIELD)
    return one_of(top, in_xargs(getattr(request, "vllm_xargs", None)), "vllm_xargs")


def in_xargs(xargs: Any) -> Any:
    """The `steering` in a request's `vllm_xargs`, which are JSON text where they come from a form."""
    if isinstance(xargs, str):
        try:
            xargs = json.loads(xargs)
        except ValueError:
            return None  # vLLM refuses it, or never reads it
    return xargs.get(FIELD) if isinstance(xargs, dict) else None


def asking(body: Any) -> str | None:
    """Where a request's JSON asks for steering, None if it does not."""
    if not isinstance(body, dict):
        return None
    if body.get(FIELD) is not None:
        return FIELD
    return None if in_xargs(body.get("vllm_xargs")) is None else f"vllm_xargs.{FIELD}"


def refusal_elsewhere(where: str, place: str) -> SteeringError:
    """What a request is told that asks, at `place` in its body, for steering `where` nothing is steered."""
    if (front_end := current_front_end()) is not None:
        front_end.refuse("route")
    remedy = f"leave the field out, or ask one of {', '.join(ANSWERING)}"
    here = "" if front_end is not None else " of a server with --enable-steering"
    return SteeringError(place, f"{where} cannot be steered: {remedy}{here}")


def one_of(top: Any, inner: Any, place: str) -> Any:
    """What is given at the top of a body or in an inner `place`; refused where it is given in both."""
    if top is not None and inner is not None:
        if (front_end := current_front_end()) is not None:
            front_end.refuse("twice")
        refuse(SteeringError(FIELD, f"given twice, at the top of the body and in {place}"))
    return inner if top is None else top


def admit_http(params: Any, given: Any) -> Any:
    """Sampling parameters with admitted steering in `extra_args`. Raises what vLLM answers with HTTP 400."""
    current = exchange.get()
    if isinstance(given, AdmittedWire):
        return params
    if current is not None and current.path.endswith("/render"):
        # The answer is another server's input, as JSON: check it, and pass on what the caller wrote.
        if given is not None:
            _admit(current_front_end(), given, count=False)
            _replace_extra(params, json.dumps(given) if isinstance(given, dict) else given)
        return params
    admission = _admit(current_front_end(), given)
    if admission is not None:
        _replace_extra(params, admission.wire)
        if current is not None:
            current.admission = admission
    return params


def admit_params(
    front_end: FrontEnd | None, params: Any, *, resumable: bool = False
) -> tuple[Any, AdmittedWire | None]:
    """Sampling parameters without their steering, and the steering admitted; None where there is none.

    The caller's own object is left as it is. vLLM walks through and copies all that it is handed, so the two meet again
    behind that, in `carry`. Raises `SteeringError` (a `ValueError`), in the form that vLLM's servers answer with HTTP
    400.
    """
    extra = getattr(params, "extra_args", None)
    given = extra.get(FIELD) if extra else None
    if not hasattr(params, "extra_args"):  # a pooling request
        return params, None
    if isinstance(given, AdmittedWire):  # admitted before, by a door of the HTTP server
        return _without_steering(params), given
    if resumable and (given is not None or (front_end is not None and front_end.default is not None)):
        if front_end is not None:
            front_end.refuse("resumable")
        refuse(SteeringError(FIELD, "a request whose prompt grows while it runs cannot be steered"))
    admission = _admit(front_end, given)
    if admission is None:
        return params, None
    return _without_steering(params), admission.wire


def carry(params: Any, wire: AdmittedWire | None) -> None:
    """Let sampling parameters that belong to one request alone carry its admitted steering."""
    if wire is not None:
        _replace_extra(params, wire)


def refuse_beam_search(given: Any) -> None:
    """Raise if a request for beam search is steered, by itself or by the server's default."""
    front_end = current_front_end()
    if given is None and (front_end is None or front_end.default is None):
        return
    if front_end is not None:
        front_end.refuse("beam_search")
    reason = "cannot be steered" if given is not None else "cannot be steered, and this server steers every request"
    refuse(SteeringError("use_beam_search", f"beam search {reason}; leave one of the two out"))


def _admit(front_end: FrontEnd | None, given: Any, *, count: bool = True) -> Admission | None:
    if front_end is None:
        if given is None:
            return None
        refuse(SteeringError(FIELD, "steering is off in this engine; start it with --enable-steering"))
    try:
        return front_end.admit(given, count=count)
    except SteeringError as error:
        refuse(error)


def _without_steering(params: Any) -> Any:
    if params.extra_args and FIELD in params.extra_args:
        params = copy.copy(params)
        params.extra_args = {key: value for key, value in params.extra_args.items() if key != FIELD} or None
    return params


def _replace_extra(params: Any, steering: Any) -> None:
    params.extra_args = {**(params.extra_args or {}), FIELD: steering}  # vLLM shares this dict with the request


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
