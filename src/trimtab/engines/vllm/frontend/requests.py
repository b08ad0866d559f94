"""What happens at the doors of vLLM's front end: a request's spec is found, admitted, and replaced by what travels.

`patches.frontend` and `patches.http` put these functions into vLLM; this module says what they do.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from trimtab.engines.vllm.bad_request import refuse
from trimtab.engines.vllm.carried import MARK, TICKET, Carried
from trimtab.engines.vllm.frontend.accounts import Account, Ticket, ticket_in
from trimtab.engines.vllm.frontend.admission import FIELD, FrontEnd
from trimtab.engines.vllm.frontend.body import DATA, Body, names_steering
from trimtab.engines.vllm.frontend.pending import NO_CHAT, Pending
from trimtab.engines.vllm.frontend.prompts import is_rendered, prompt_tokens
from trimtab.errors import SteeringError
from trimtab.spec.faults import join
from trimtab.spec.request import OF_AN_INTERVENTION, Steering


class Exchange:
    """One HTTP request, or one line of a batch, while it is being answered: where it came in, what its body says as
    `steering` once that `was_read`, and once it is admitted, the account of its answer."""

    __slots__ = ("account", "given", "path", "was_read")

    def __init__(self, path: str) -> None:
        self.path = path
        self.was_read = False
        self.given: Any = None
        self.account: Account | None = None

    def read(self, given: Any) -> None:
        """Note what the body says as `steering`."""
        self.was_read, self.given = True, given


exchange: ContextVar[Exchange | None] = ContextVar("trimtab_exchange", default=None)

OFF = "steering is off in this engine; start it with --enable-steering"

PLACES = frozenset({FIELD, f"vllm_xargs.{FIELD}"})  # in a body, where a spec may stand

# Keys of a spec, which no request of vLLM has: beside a spec they mean it.
KEYS_WITHIN = OF_AN_INTERVENTION | Steering.model_fields.keys()

_OURS = (FIELD, TICKET, MARK)  # what `extra_args` hold for our own use

IN_PYTHON = frozenset({f"extra_args.{FIELD}"})

# The routes that steer what they answer, for messages; `http.before_routes` has all that take a spec.
ANSWERING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/inference/v1/generate")

_current: FrontEnd | None = None


def current_front_end() -> FrontEnd | None:
    """The front end of this process's engine, the latest one made; None where steering is off."""
    return _current


def set_current_front_end(front_end: FrontEnd | None) -> None:
    """Make `front_end` the one that HTTP requests of this process meet."""
    global _current
    _current = front_end


def given_by(request: Any) -> Any:
    """What a request model says as `steering`. Raises what vLLM answers with HTTP 400 where it stands elsewhere."""
    current = exchange.get()
    if current is not None and current.was_read:
        return current.given
    try:  # no route of ours read the body: a batch line, or the server of another framework around vLLM's handlers
        return spec_in(Body(dict(request)))
    except SteeringError as error:
        refuse(error)


def spec_in(body: Body, places: frozenset[str] = PLACES) -> Any:
    """What a body says as `steering` in one of `places`; None if it asks for none.

    Raises `SteeringError` where it asks elsewhere, by another name or twice, for an object in the spec that repeats a
    key, and for a key of a spec that stands beside it.
    """
    off = current_front_end() is None
    given: dict[str, Any] = {}
    for place, value, twice in body.asks(ours_alone=off):
        if off:
            raise SteeringError(place, OFF)
        if twice or given:
            raise _refused("twice", place, "given twice in one request: leave all but one out")
        if place not in places:
            raise _refused("place", place, _where_it_belongs(place, places))
        if (key := body.key_given_twice(value)) is not None:
            raise _refused("twice", place, f"the key {key!r:.80} is given twice in one object")
        _refuse_strays(body, place)
        given[place] = value
    return next(iter(given.values()), None)


def refuse_beside(fields: Iterable[tuple[str, Any]], within: str) -> None:
    """Raise `SteeringError` where `fields` beside a body, of its query or its headers, ask for steering."""
    off = current_front_end() is None
    for ask in Body.of_form(fields).asks(ours_alone=off):
        place = join(within, ask.place)
        raise SteeringError(place, OFF) if off else _refused("place", place, _where_it_belongs(ask.place, PLACES))


def refuse_all(body: Body, where: str) -> None:
    """Raise `SteeringError` if a body asks for steering, `where` nothing is steered."""
    for ask in body.asks(ours_alone=current_front_end() is None):
        raise refusal_elsewhere(where, ask.place)


def _refuse_strays(body: Body, place: str) -> None:
    """Raise `SteeringError` where a key of a spec stands beside the spec at `place`, where no one reads it."""
    for holder, fields in body.holders(place):
        for key in sorted(KEYS_WITHIN & fields.keys()):
            if fields[key] is not None:
                home = f"`{FIELD}`" if key in Steering.model_fields else f"an intervention, in `{FIELD}.interventions`"
                more = f"; if another plugin reads it here, give `{FIELD}` at the top of the body" if holder else ""
                raise _refused("place", join(holder, key), f"would be ignored here: `{key}` belongs into {home}{more}")


def _where_it_belongs(place: str, places: frozenset[str]) -> str:
    known = " or ".join(sorted(places, key=len))
    if place.rpartition(".")[2] == FIELD:
        return f"would be ignored here: a spec stands in {known}. (A client's `extra_body` is unpacked by the client.)"
    return f"would be ignored: what is to be steered is said in {known}; say it there, or leave this out"


def _refused(reason: str, field: str, message: str) -> SteeringError:
    if (front_end := current_front_end()) is not None:
        front_end.refuse(reason)
    return SteeringError(field, message)


def refusal_elsewhere(where: str, place: str) -> SteeringError:
    """What a request is told that asks, at `place` in its body, for steering `where` nothing is steered."""
    remedy = f"leave the field out, or ask one of {', '.join(ANSWERING)}"
    here = "" if current_front_end() is not None else " of a server with --enable-steering"
    return _refused("route", place, f"{where} cannot be steered: {remedy}{here}")


def admit_http(params: Any, given: Any) -> Any:
    """Sampling parameters with admitted steering in `extra_args`. Raises what vLLM answers with HTTP 400.

    An exchange has one body and one receipt, so it is admitted once, and each of its prompts carries the same, or is
    placed by itself later on.
    """
    current = exchange.get()
    if isinstance(given, (Carried, Pending)):
        return params
    if current is not None and current.account is not None:  # names may stand for something else by now
        carry(params, {FIELD: current.account.admitted, TICKET: Ticket(current.account)})
        return params
    if current is not None and current.path.endswith("/render"):
        # The answer is another server's input, as JSON: check it, and pass on what the caller wrote. It gets token ids.
        if given is not None:
            _admit(current_front_end(), given, here=False)
            carry(params, {FIELD: json.dumps(given) if isinstance(given, dict) else given})
        return params
    admitted = _admit(current_front_end(), given)
    if admitted is not None:
        carry(params, _carried(admitted))
    return params


def admit_params(
    front_end: FrontEnd | None, params: Any, *, resumable: bool = False
) -> tuple[Any, dict[str, Any] | None]:
    """Sampling parameters without their steering, and what they are to carry of it; None where there is none.

    The caller's own object is left as it is. vLLM walks through and copies all that it is handed, so the two meet again
    behind that, in `carry`. Raises `SteeringError` (a `ValueError`), in the form that vLLM's servers answer with HTTP
    400.
    """
    if not hasattr(params, "extra_args"):  # a pooling request
        return params, None
    given = (params.extra_args or {}).get(FIELD)
    if front_end is not None and params.extra_args:
        _refuse_misplaced(front_end, params.extra_args)
    if isinstance(given, (Carried, Pending)):  # admitted before, by a door of the HTTP server
        return _without_steering(params), {FIELD: given, TICKET: ticket_in(params.extra_args)}
    if resumable and (given is not None or (front_end is not None and front_end.default is not None)):
        if front_end is not None:
            front_end.refuse("resumable")
        refuse(SteeringError(FIELD, "a request whose prompt grows while it runs cannot be steered"))
    admitted = _admit(front_end, given)
    if admitted is None:
        return params, None
    return _without_steering(params), _carried(admitted)


def placed_params(processor: Any, prompt: Any, params: Any) -> Any:
    """Sampling parameters whose steering is placed on `prompt`, if vLLM has rendered it.

    The caller's own object is left as it is. Raises what vLLM answers with HTTP 400.
    """
    steering = (getattr(params, "extra_args", None) or {}).get(FIELD)
    if not (isinstance(steering, Pending) and is_rendered(prompt)):
        return params
    placed = copy.copy(params)
    ids, embeddings = prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
    carry(placed, place(processor, prompt, ids, embeddings, {FIELD: steering, TICKET: ticket_in(params.extra_args)}))
    return placed


def place(
    processor: Any, prompt: Any, ids: Sequence[int] | None, embeddings: Any, steering: dict[str, Any] | None
) -> dict[str, Any] | None:
    """What sampling parameters are to carry, placed on the prompt of their request, with these ids or embeddings.

    Raises what vLLM answers with HTTP 400.
    """
    if steering is None or not isinstance(pending := steering[FIELD], Pending):
        return steering
    ticket = steering[TICKET]
    carried = None if ticket is None else ticket.account.placed_on(prompt)
    if carried is None:
        try:
            carried = pending.place(prompt_tokens(processor, prompt, ids, embeddings))
        except SteeringError as error:
            refuse(error)
        front_end: FrontEnd | None = getattr(processor, "_trimtab_front_end", None)
        if front_end is not None and (ticket is None or not ticket.account.placed):
            front_end.steered()
        if ticket is not None:
            ticket.account.place(carried, prompt)
    return {FIELD: carried, TICKET: ticket}


def carry(params: Any, steering: dict[str, Any] | None) -> None:
    """Let sampling parameters that belong to one request alone carry its steering."""
    if steering is not None:
        params.extra_args = {**(params.extra_args or {}), **steering}  # vLLM shares this dict with the request


def mark(front_end: FrontEnd | None, params: Any) -> None:
    """Let a request of a steered engine show that its front end looked for steering. `params` are None for pooling."""
    if front_end is not None and params is not None:
        params.extra_args = {**(params.extra_args or {}), MARK: True}


def _carried(admitted: Carried | Pending) -> dict[str, Any]:
    """The admitted steering of a request, and the ticket to its account: the exchange's, or one of its own."""
    current = exchange.get()
    account = None if current is None else current.account
    if account is None or account.admitted is not admitted:
        account = Account(admitted)
        if current is not None:
            current.account = account
    return {FIELD: admitted, TICKET: Ticket(account)}


def refuse_beam_search(given: Any) -> None:
    """Raise if a request for beam search is steered, by itself or by the server's default."""
    front_end = current_front_end()
    if given is None and (front_end is None or front_end.default is None):
        return
    if front_end is not None:
        front_end.refuse("beam_search")
    reason = "cannot be steered" if given is not None else "cannot be steered, and this server steers every request"
    refuse(SteeringError("use_beam_search", f"beam search {reason}; leave one of the two out"))


def _admit(front_end: FrontEnd | None, given: Any, *, here: bool = True) -> Carried | Pending | None:
    if front_end is None:
        if given is None:
            return None
        refuse(SteeringError(FIELD, OFF))
    try:
        admitted = front_end.admit(given, count=here)
    except SteeringError as error:
        refuse(error)
    if not here and isinstance(admitted, Pending) and (role := admitted.role) is not None:
        refuse(_refused("role", join(FIELD, role), NO_CHAT))
    return admitted


def _refuse_misplaced(front_end: FrontEnd, extra: Mapping[str, Any]) -> None:
    """Raise if `extra_args` ask for steering by another name than ours, or deeper within."""
    for name, value in extra.items():
        if name in _OURS or name in DATA:
            continue
        inner = f".{FIELD}" if isinstance(value, Mapping) and value.get(FIELD) is not None else ""
        if inner or (value is not None and isinstance(name, str) and names_steering(name)):
            front_end.refuse("place")
            refuse(SteeringError(f"extra_args.{name}{inner}", _where_it_belongs(f"{name}{inner}", IN_PYTHON)))


def _without_steering(params: Any) -> Any:
    if params.extra_args and FIELD in params.extra_args:
        params = copy.copy(params)
        ours = (FIELD, TICKET)
        params.extra_args = {key: value for key, value in params.extra_args.items() if key not in ours} or None
    return params
