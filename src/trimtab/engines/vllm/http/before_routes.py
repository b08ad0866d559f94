"""What stands before each route of the server: a request is read once, and none is answered as if it had not asked.

A spec is found in the body, wherever the route takes one, and handed to `patches.http`. Steering that is
asked for anywhere else is refused: at a route that cannot be steered, in a place that no one reads, by another name.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response, params
from fastapi.routing import APIRoute, APIWebSocketRoute, request_response

from trimtab.engines.vllm.frontend.admission import FIELD
from trimtab.engines.vllm.frontend.body import Body
from trimtab.engines.vllm.frontend.requests import (
    PLACES,
    Exchange,
    current_front_end,
    exchange,
    refuse_all,
    refuse_beside,
    spec_in,
)
from trimtab.engines.vllm.http.registration_body import refusal
from trimtab.errors import SteeringError

# Routes whose requests reach the patches of `patches.http`, which admit a spec or refuse it.
DOORS = frozenset(
    {
        "/inference/v1/generate",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/completions",
        "/v1/completions/render",
        "/v1/messages",
        "/v1/messages/render",
        "/v1/responses",
        "/v1/responses/render",
    }
)

BY_CONTENT = "/invocations"  # hands a body to the first handler that takes it: a door where the model generates

MORE_PLACES = {"/inference/v1/generate": frozenset({f"sampling_params.extra_args.{FIELD}"})}

# Others' headers may speak of steering too, of traffic or content. One whose words are all among these speaks of ours.
HEADERS = frozenset({"steer", "steering", "spec", "vector", "vectors", "activation", "trimtab", "vllm", "llm", "x"})

_NO_JSON = ("multipart/", "application/x-www-form-urlencoded", "application/octet-stream", "audio/", "image/", "video/")


def guard_routes(app: FastAPI) -> None:
    """Stand before each route of `app` that takes a body or a session. Not for our own routes."""
    doors = DOORS if current_front_end() is None else DOORS | {BY_CONTENT}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods & {"POST", "PUT", "PATCH"}:
            route.app = request_response(_reading(route, door=route.path in doors))
        elif isinstance(route, APIWebSocketRoute):
            route.app = _Session(route.app)


def _speaks_of_ours(header: str) -> bool:
    words = set(header.lower().replace("_", "-").split("-"))
    return words <= HEADERS and bool(words & {"steer", "steering", "trimtab"})


class _ReadRequest(Request):  # type: ignore[misc]
    """A request whose JSON is parsed with a look at every key, once for us and for the route."""

    _read: Body | None = None

    async def json(self) -> Any:
        return (await self.read()).value

    async def read(self) -> Body:
        """Its body. Raises what `json.loads` raises."""
        if self._read is None:
            self._read = Body.read(await self.body())
        return self._read


def _reading(route: APIRoute, *, door: bool) -> Callable[[Request], Awaitable[Response]]:
    """The handler of `route` with our own before it, in the way that FastAPI has for custom requests."""
    handle = route.get_route_handler()
    takes_form = route.body_field is not None and isinstance(route.body_field.field_info, params.Form)
    places = PLACES | MORE_PLACES.get(route.path, frozenset())

    async def handler(plain: Request) -> Response:
        request = _ReadRequest(plain.scope, plain.receive)
        try:
            refuse_beside(request.query_params.multi_items(), "query")
            refuse_beside(((name, "") for name in request.headers if _speaks_of_ours(name)), "headers")
            body = await _body_of(request, takes_form=takes_form)
            if not door and body is not None:
                refuse_all(body, route.path)
            given = spec_in(body, places) if door and body is not None else None
        except SteeringError as error:
            return refusal(error)
        current = exchange.get() or Exchange(route.path)
        current.read(given)
        token = exchange.set(current)
        try:
            return await handle(request)
        finally:
            exchange.reset(token)

    return handler


async def _body_of(request: _ReadRequest, *, takes_form: bool) -> Body | None:
    """What `request` says; None where it is no JSON, of which the route says what is wrong, and for uploads.

    Raises `SteeringError` for JSON that Python cannot read, about which not every route would find words.
    """
    if takes_form:
        return Body.of_form((await request.form()).multi_items())  # parsed once: a request keeps its form
    if request.headers.get("content-type", "").lower().startswith(_NO_JSON):
        return None
    try:
        return await request.read()
    except json.JSONDecodeError:
        return None
    except RecursionError:
        raise SteeringError("", "the body cannot be read: its JSON is nested too deeply") from None
    except ValueError as error:  # no text in a known encoding, a number of 10,000 digits
        raise SteeringError("", f"the body cannot be read as JSON: {error}"[:300]) from None


class _Session:
    """An ASGI application in front of a realtime session: answers an event that asks for steering with an error."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def receive_checked() -> Any:
            while True:
                message = await receive()
                if (fault := _fault_of(message.get("text"))) is None:
                    return message
                event = {"type": "error", "error": str(fault), "code": "invalid_event"}
                await send({"type": "websocket.send", "text": json.dumps(event)})

        await self._app(scope, receive_checked, send)


def _fault_of(event: str | None) -> SteeringError | None:
    try:
        refuse_all(Body.read(event or "null"), "a realtime session")
    except SteeringError as error:
        return error
    except (ValueError, RecursionError):
        return None  # the session says what is wrong with it
    return None
