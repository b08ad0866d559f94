"""Routes that cannot be steered: a request there that asks for steering is refused, never answered without it."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from trimtab.engines.vllm.doors import asking, current_front_end, refusal_elsewhere
from trimtab.engines.vllm.frontend import FIELD
from trimtab.engines.vllm.registration import refusal

# Routes whose requests reach the patches of `compat_http`, which admit a spec or refuse it.
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


def guard_routes(app: FastAPI) -> None:
    """Let each route of `app` that is no door refuse bodies that ask for steering. Not for our own routes."""
    doors = DOORS if current_front_end() is None else DOORS | {BY_CONTENT}
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods & {"POST", "PUT", "PATCH"} and route.path not in doors:
            route.app = _Guard(route.app, route.path)


class _Guard:
    """An ASGI application in front of a route's own. It reads JSON bodies, which the route would read in whole too."""

    def __init__(self, app: Any, path: str) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if b"json" not in dict(scope["headers"]).get(b"content-type", b"").lower():
            await self._app(scope, receive, send)  # an upload, perhaps a large one
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if (place := _asking(body)) is not None:
            await refusal(refusal_elsewhere(self._path, place))(scope, receive, send)
            return

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


def _asking(body: bytes) -> str | None:
    if FIELD.encode() not in body:  # nearly always: no body is parsed twice for nothing
        return None
    try:
        return asking(json.loads(body))
    except ValueError:
        return None  # the route says what is wrong with it
