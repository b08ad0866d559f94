"""Receipts on their way out: where they stand in answers and streams, what waits for what, ids that name answers."""

import asyncio
import json
import pickle
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from trimtab.engines.vllm.carried import TICKET, owner_of
from trimtab.engines.vllm.frontend import accounts, requests
from trimtab.engines.vllm.frontend.accounts import Account, Answers, Ticket, ticket_in
from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.frontend.workers import Uses, Workers
from trimtab.engines.vllm.http.receipts import ExchangeMiddleware
from trimtab.program.counting import SlotUse
from trimtab.serving.registry import ProbeRegistry, VectorRegistry
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site, SlotLimits
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

starlette = pytest.importorskip("starlette")

from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse  # noqa: E402

SITE = Site(0, HookPoint.POST_BLOCK)
CALM = SteeringVector({SITE: np.ones(4)})
FRONT_END = FrontEnd(
    ModelSites(
        4,
        1,
        frozenset([SITE]),
        gates=GateLimits(1, frozenset([SITE])),
        slots=SlotLimits(1, frozenset([SITE]), frozenset(["clamp"])),
    ),
    VectorRegistry({"calm": CALM}),
    probes=ProbeRegistry({"anger": Probe.at(SITE, np.ones(4))}),
)


def admission(gated: bool = False, phase: str = "all") -> Any:
    gate = {"gate": {"probe": "anger", "threshold": 0.0}} if gated else {}
    return FRONT_END.admit({"interventions": [{"kind": "add", "vector": "calm", "phase": phase, **gate}]})


class Silent(Workers):
    """Workers that never answer in time."""

    async def uses(self, answer: str, seconds: float = 0.0) -> Uses | None:
        return None


async def answered(
    app: Any, workers: Workers | None = None, answers: Answers | None = None, into: Any = None
) -> list[dict[str, Any]]:
    """The messages that the server gets to send, which are added to the list `into` as they come."""
    sent: list[dict[str, Any]] = [] if into is None else into

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    scope = {
        "type": "http",
        "path": "/v1/completions",
        "method": "POST",
        "headers": [],
        "asgi": {"spec_version": "2.4"},
    }
    await ExchangeMiddleware(app, workers or Workers(), answers or Answers())(scope, receive, send)
    return sent


def app_that(respond: Any, gated: bool = False) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        current = requests.exchange.get()
        assert current is not None
        current.account = Account(admission(gated))
        await respond(current.account)(scope, receive, send)

    return app


def finish(account: Account, prompt: int = 7, new: int = 3) -> None:
    account.begun()
    account.finished(account.admitted, prompt, range(new))


def test_a_json_answer_carries_the_receipt_and_its_length_is_right() -> None:
    def respond(account: Account) -> Any:
        finish(account)
        return JSONResponse({"id": "x", "text": "}"})

    start, body = asyncio.run(answered(app_that(respond)))
    told = json.loads(body["body"])
    assert told["steering"]["steered_tokens"] == {"prefill": 7, "decode": 2}
    assert told["steering"]["vectors"] == [{"name": "calm", "digest": CALM.digest.hex()}]
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert b"x-trimtab-steering" in dict(start["headers"])


@pytest.mark.parametrize(
    "response",
    [
        PlainTextResponse("{}"), JSONResponse({}), JSONResponse([1]), JSONResponse({"error": 1}, 400),
    ],
)  # fmt: skip
def test_what_is_no_answer_in_json_goes_out_as_it_is(response) -> None:
    def respond(account: Account) -> Any:
        finish(account)
        return response

    _, body = asyncio.run(answered(app_that(respond)))
    assert body["body"] == response.body


def test_an_answer_made_in_the_background_does_not_say_that_nothing_was_steered() -> None:
    def respond(account: Account) -> Any:
        account.begun()
        return JSONResponse({"id": "x", "status": "queued"})

    _, body = asyncio.run(answered(app_that(respond)))
    told = json.loads(body["body"])["steering"]
    assert told["steered_tokens"] is None
    assert [entry["tokens"] for entry in told["interventions"]] == [None]


@pytest.mark.parametrize("done", [b"data: [DONE]\n\n", b""], ids=["done", "no end mark"])
def test_the_last_event_of_a_stream_carries_the_receipt_and_no_event_waits_for_a_token(done) -> None:
    passed: list[int] = []
    sent: list[dict[str, Any]] = []

    def respond(account: Account) -> Any:
        async def stream() -> Any:
            account.begun()
            for number in range(3):
                passed.append(len(sent))
                yield b'event: token\ndata: {"number": %d}\n\n' % number
                yield b": keep-alive\n\n"
            account.finished(account.admitted, 5, range(4))
            yield b'data: {"number": 3}\n\n'
            yield b": keep-alive\n\n"
            yield b'event: usage\ndata: {"number": 4}\n\n'
            if done:
                yield done

        return StreamingResponse(stream(), media_type="text/event-stream")

    asyncio.run(answered(app_that(respond), into=sent))
    assert passed == [1, 3, 5]  # each event was out before the next token was asked for
    text = b"".join(message.get("body", b"") for message in sent).decode()
    told = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [event["number"] for event in told] == [0, 1, 2, 3, 4]
    assert ["steering" in event for event in told] == [False] * 4 + [True]
    assert told[-1]["steering"]["steered_tokens"] == {"prefill": 5, "decode": 3}
    assert text.count("event: ") == 4
    assert text.count(": keep-alive") == 4
    assert text.endswith(done.decode() or "\n\n")


def test_an_answer_does_not_wait_for_silent_workers_and_says_what_it_lacks() -> None:
    def respond(account: Account) -> Any:
        finish(account)
        return JSONResponse({"id": "x"})

    answers = Answers()
    start, body = asyncio.run(answered(app_that(respond, gated=True), Silent(), answers))
    told = json.loads(body["body"])["steering"]
    assert (told["gates"], told["steered_tokens"]) == (None, {"prefill": 7, "decode": 2})
    assert "did not answer in time" in told["gates_missing"]
    assert answers.find("x") == dict(start["headers"])[b"x-trimtab-answer"].decode()


ASKED = {"interventions": [{"kind": "clamp", "vector": "calm", "max": 1.0}, {"kind": "add", "vector": "calm"}]}


class Knowing(Workers):
    """Workers that tell of one slot, in both phases."""

    def __init__(self, slot: str) -> None:
        super().__init__()
        self.slot = slot

    async def uses(self, answer: str, seconds: float = 0.0) -> Uses | None:
        measured = {Phase.PREFILL: 7, Phase.DECODE: 2}
        slots = [
            SlotUse(str(p), self.slot, "post_block:0", n, total=3.0 * n, moved=n // 2) for p, n in measured.items()
        ]
        return Uses([], slots)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_says_what_each_intervention_did_or_that_it_is_not_known(known, streams) -> None:
    admitted = FRONT_END.admit(ASKED)
    assert admitted is not None
    (slot,) = {slot.digest.hex() for slot in admitted.steering.slots}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current = requests.exchange.get()
        assert current is not None
        account = current.account = Account(admitted)
        for _ in range(2):  # of two choices
            finish(account)

        async def stream() -> Any:
            yield b'data: {"id": "x"}\n\n'
            yield b"data: [DONE]\n\n"

        kind = "text/event-stream"
        response = StreamingResponse(stream(), media_type=kind) if streams else JSONResponse({"id": "x"})
        await response(scope, receive, send)

    sent = asyncio.run(answered(app, Knowing(slot) if known else Silent()))
    body = b"".join(message.get("body", b"") for message in sent).removeprefix(b"data: ").split(b"\n\n")[0]
    told = json.loads(body)["steering"]
    clamp, add = told["interventions"]
    vectors = [{"name": "calm", "digest": CALM.digest.hex()}]
    assert add == {"index": 1, "kind": "add", "vectors": vectors, "tokens": 18}
    numbers = (9, 3.0, 4 / 9) if known else (None, None, None)
    measured = dict(zip(("measured", "mean_correction", "touched"), numbers, strict=True))
    assert clamp == {"index": 0, "kind": "clamp", "vectors": vectors, "tokens": 18, **measured}
    assert ("corrections_missing" in told) is not known
    assert "gates" not in told


def test_ids_of_answers_are_matched_whole_forgotten_in_order_and_ambiguous_ones_name_nobody(monkeypatch) -> None:
    monkeypatch.setattr(accounts, "KEPT_ANSWERS", 3)
    answers = Answers()
    answers.add("a", "1")
    answers.add("a-b", "2")
    answers.add("a" * 100_000, "3")
    assert (answers.find("a"), answers.find("a-b"), answers.find("a" * 100_000)) == ("1", "2", "3")
    answers.add("a", "1")
    assert answers.find("a") == "1"
    answers.add("a", "4")
    answers.add("a", "1")
    assert answers.find("a") is None
    answers.add("c", "5")
    with pytest.raises(KeyError):
        answers.find("a-b")
    assert all(len(key) == 32 for key in answers._names)


def test_tickets_are_plain_everywhere_else_and_never_taken_from_a_caller() -> None:
    ticket = Ticket(Account(admission()))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ticket)) == {"answer": ticket.account.name}
    assert type(pickle.loads(pickle.dumps(ticket))) is dict
    assert ticket_in({TICKET: ticket}) is ticket
    assert ticket_in({TICKET: dict(ticket)}) is ticket_in({TICKET: "x"}) is ticket_in(None) is None

    params = SimpleNamespace(extra_args={TICKET: dict(ticket)})
    assert owner_of(params, "r") == ticket.account.name
    for forged in ({}, {TICKET: "x"}, {TICKET: {"answer": 3}}, {TICKET: {"answer": "x" * 65}}, None):
        assert len(owner_of(SimpleNamespace(extra_args=forged), "r" * 100_000)) == 64


@pytest.mark.parametrize(("phase", "want"), [("all", (19, 3)), ("prefill", (19, 0)), ("decode", (0, 3))])
def test_an_account_adds_up_the_requests_of_its_answer(phase, want) -> None:
    account = Account(admission(phase=phase))
    receipt = account.receipt
    assert receipt["steered_tokens"] == {"prefill": 0, "decode": 0}
    for prompt, new in ((7, 3), (7, 2), (5, 1)):
        account.begun()
        assert not account.complete
        account.finished(account.admitted, prompt, range(new))
    assert account.complete
    assert account.receipt is receipt
    assert tuple(receipt["steered_tokens"].values()) == want
