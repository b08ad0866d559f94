"""The receipt of a steered HTTP request: on a header of its answer, and in the body when all tokens are there.

A JSON answer has it as `steering`, a stream in its last event. Both are added to the bytes on their way out, one way
for all routes, so that neither depends on what response models keep. The events of a stream pass at once while a
request of its answer still runs; after that the latest is held back until the next one, for it may be the last.
"""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from trimtab.engines.vllm.frontend.accounts import Account, Answers
from trimtab.engines.vllm.frontend.admission import FIELD
from trimtab.engines.vllm.frontend.requests import Exchange, exchange
from trimtab.engines.vllm.frontend.workers import Workers
from trimtab.serving.interventions import with_corrections
from trimtab.serving.receipt import with_gates
from trimtab.sites import Phase

RECEIPT_HEADER = b"x-trimtab-steering"
ACCOUNT_HEADER = b"x-trimtab-answer"  # the name that `GET /v1/steering/gates/{id}` takes too, in any API server

_EVENT = re.compile(rb"^data: ?(\{.*\})\s*$", re.MULTILINE)

Send = Callable[[Any], Awaitable[None]]


class ExchangeMiddleware:
    """Gives each HTTP request its `Exchange`, and its answer the receipt of what was admitted in it."""

    def __init__(self, app: Any, workers: Workers, answers: Answers) -> None:
        self._app, self._workers, self._answers = app, workers, answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].rstrip("/") == "/metrics":
            await self._workers.refresh_metrics()
        current = Exchange(scope["path"])
        token = exchange.set(current)
        try:
            await self._app(scope, receive, _Answer(current, send, self._workers, self._answers).send)
        finally:
            exchange.reset(token)


async def told(account: Account, workers: Workers) -> dict[str, Any]:
    """The receipt of an answer, with what its gates and slots did.

    If workers do not say so in time, `gates` is None and `gates_missing` the reason, and likewise for corrections: an
    answer does not wait for numbers about it. Where requests of the answer are not finished (one that is made in the
    background), what was steered is not known: `steered_tokens` is None, and so are the tokens of interventions.
    """
    receipt = account.receipt
    if not account.complete:
        unknown = [entry | {"tokens": None} for entry in receipt["interventions"]]
        return {**receipt, "steered_tokens": None, "interventions": unknown}
    if not account.measured:
        return receipt
    uses = await workers.uses(account.name)
    if any(account.slots):
        receipt = with_corrections(receipt, account.slots, None if uses is None else uses.slots)
    return with_gates(receipt, None if uses is None else uses.gates) if account.gated else receipt


def _last_event(body: bytes) -> re.Match[bytes] | None:
    return next(reversed(list(_EVENT.finditer(body))), None)


class _Answer:
    """What is sent in answer to one request. Nothing is changed until a door has admitted steering."""

    def __init__(self, current: Exchange, send: Send, workers: Workers, answers: Answers) -> None:
        self._current, self._send, self._workers, self._answers = current, send, workers, answers
        self._start: Any = None  # of a JSON answer, held until its length is known
        self._held = b""  # the latest event of a stream, which may be the last
        self._kind = b""
        self._named = False

    async def send(self, message: Any) -> None:
        account = self._current.account
        if (
            account is None
            or not account.placed
            or message["type"] not in ("http.response.start", "http.response.body")
        ):
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._begin(message, account)
        elif self._kind == b"application/json":
            await self._whole(message, account)
        elif self._kind == b"text/event-stream":
            await self._event(message, account)
        else:
            await self._send(message)

    async def _begin(self, message: Any, account: Account) -> None:
        headers = list(message.get("headers", ()))
        if message["status"] == 200:
            self._kind = dict(headers).get(b"content-type", b"").split(b";")[0].strip()
        identity = account.receipt["identity"]
        value = ", ".join(f"{phase.value}={identity[phase.value]}" for phase in Phase)
        headers.append((RECEIPT_HEADER, value.encode()))
        if account.gated:
            headers.append((ACCOUNT_HEADER, account.name.encode()))
        message = {**message, "headers": headers}
        if self._kind == b"application/json":
            self._start = message
        else:
            await self._send(message)

    async def _whole(self, message: Any, account: Account) -> None:
        if self._start is not None:
            if not message.get("more_body"):  # else it comes in pieces, as no answer of vLLM's does
                message = {**message, "body": await self._with_receipt(message.get("body", b""), account)}
                self._start["headers"] = [
                    (name, str(len(message["body"])).encode() if name == b"content-length" else value)
                    for name, value in self._start["headers"]
                ]
            await self._send(self._start)
            self._start = None
        await self._send(message)

    async def _event(self, message: Any, account: Account) -> None:
        body = message.get("body", b"")
        event = _last_event(body)
        if event is not None and account.gated and not self._named:
            self._remember(event[1], account)
        if event is None and (not message.get("more_body") or b"[DONE]" in body):
            held, self._held = self._held, b""
            if (last := _last_event(held)) is not None and account.complete:
                whole = await self._with_receipt(last[1], account)
                held = held[: last.start(1)] + whole + held[last.end(1) :]
            body = held + body
        elif event is not None and account.complete and message.get("more_body"):
            self._held, body = body, self._held
        else:
            self._held, body = b"", self._held + body
        if body or not message.get("more_body"):
            await self._send({**message, "body": body})

    async def _with_receipt(self, document: bytes, account: Account) -> bytes:
        """A JSON object with the receipt as its last member; anything else as it is."""
        if document[:1] != b"{" or document[-1:] != b"}" or document == b"{}":
            return document
        if account.gated and not self._named:
            self._remember(document, account)
        receipt = json.dumps(await told(account, self._workers), separators=(",", ":")).encode()
        return document[:-1] + b',"' + FIELD.encode() + b'":' + receipt + b"}"

    def _remember(self, document: bytes, account: Account) -> None:
        """Note by which id the caller knows this answer."""
        self._named = True
        answer = json.loads(document)
        for place in (answer, answer.get("response"), answer.get("message")):
            answer_id = (place.get("id") or place.get("request_id")) if isinstance(place, dict) else None
            if isinstance(answer_id, str):
                self._answers.add(answer_id, account.name)
                return
