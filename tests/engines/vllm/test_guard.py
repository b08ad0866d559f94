"""What stands before each route, on an application of our own: one parse, and no answer that ignores what was asked."""

import importlib
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import numpy as np
import pytest

from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.serving.registry import VectorRegistry
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.vectors.vector import SteeringVector

pytest.importorskip("vllm")

from fastapi import FastAPI, Form, Request, WebSocket, WebSocketDisconnect
from fastapi.testclient import TestClient

from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.http import routes
from trimtab.engines.vllm.http.before_routes import guard_routes
from trimtab.engines.vllm.patches.http import PROTOCOLS

pytestmark = pytest.mark.vllm

SPEC = {"interventions": [{"kind": "add", "vector": "calm", "scale": 2.0}]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def front_end() -> Iterator[FrontEnd]:
    calm = SteeringVector({Site(0, HookPoint.POST_BLOCK): np.arange(1.0, 9.0)})
    front_end = FrontEnd(ModelSites(8, 2, frozenset({Site(0, HookPoint.POST_BLOCK)})), VectorRegistry({"calm": calm}))
    requests.set_current_front_end(front_end)
    yield front_end
    requests.set_current_front_end(None)


def application() -> TestClient:
    """Routes by vLLM's names that answer with what they were given."""
    app = FastAPI()

    @app.post("/v1/completions")
    @app.post("/inference/v1/generate")
    async def door(body: dict[str, Any], raw: Request) -> dict[str, Any]:
        current = requests.exchange.get()
        assert current is not None
        assert body == await raw.json()
        return {"given": current.given, "body": body}

    @app.post("/tokenize")
    async def other(raw: Request) -> Any:
        return await raw.json()

    @app.post("/v1/audio/transcriptions")
    async def heard(model: Annotated[str, Form()], raw: Request) -> dict[str, Any]:
        current = requests.exchange.get()
        assert current is not None
        return {"given": current.given, "model": model}

    @app.websocket("/v1/realtime")
    async def session(socket: WebSocket) -> None:
        await socket.accept()
        with suppress(WebSocketDisconnect):
            while True:
                await socket.send_json({"heard": await socket.receive_json()})

    guard_routes(app)
    return TestClient(app, raise_server_exceptions=False)


def refused(answer: Any, place: str, said: str = "") -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (place, "BadRequestError")
    assert said in error["message"]


def test_a_body_is_parsed_once_for_us_and_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    loads = json.loads

    def counting(text: Any, **options: Any) -> Any:
        parsed.append(text)
        return loads(text, **options)

    client = application()
    monkeypatch.setattr(json, "loads", counting)
    answer = client.post("/v1/completions", json={"steering": SPEC})
    assert len(parsed) == 1
    monkeypatch.undo()
    assert answer.json() == {"given": SPEC, "body": {"steering": SPEC}}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"Steering": SPEC}, "Steering"),
        ({"extra_body": {"steering": SPEC}}, "extra_body.steering"),
        ({"sampling_params": {"extra_args": {"steering": SPEC}}}, "sampling_params.extra_args.steering"),
        ({"vllm_xargs": {"hotwire": "[]"}}, "vllm_xargs.hotwire"),
        ({"steering": SPEC, "steering_vectors": {}}, "steering_vectors"),
        ({"steering": SPEC, "vllm_xargs": {"steering": json.dumps(SPEC)}}, "vllm_xargs.steering"),
    ],
)
def test_a_door_refuses_what_it_would_ignore(front_end: FrontEnd, body: dict[str, Any], place: str) -> None:
    refused(application().post("/v1/completions", json=body), place)


@pytest.mark.parametrize("key", sorted(requests.KEYS_WITHIN - {"interventions"}))
@pytest.mark.parametrize("route", ["/v1/completions", "/inference/v1/generate"])
def test_a_key_of_a_spec_beside_it_is_refused_with_where_it_belongs(route: str, key: str) -> None:
    home = "`steering`" if key == "keep_norm" else "an intervention, in `steering.interventions`"
    answer = application().post(route, json={"prompt": "a", key: {"answer": "all"}, "steering": SPEC})
    refused(answer, key, f"`{key}` belongs into {home}")
    for ignored in ({key: None, "steering": SPEC}, {key: 1}, {key: 1, "steering": None}):
        assert application().post(route, json=ignored).status_code == 200


@pytest.mark.parametrize(
    ("route", "body", "place"),
    [
        ("/v1/completions", {"vllm_xargs": {"steering": SPEC, "where": {}}}, "vllm_xargs.where"),
        ("/v1/completions", {"vllm_xargs": {"steering": SPEC}, "where": {}}, "where"),
        (
            "/inference/v1/generate",
            {"sampling_params": {"extra_args": {"steering": SPEC, "phase": "decode"}}},
            "sampling_params.extra_args.phase",
        ),
        (
            "/inference/v1/generate",
            {"sampling_params": {"extra_args": {"steering": SPEC}, "gate": {}}},
            "sampling_params.gate",
        ),
    ],
)
def test_a_key_beside_a_spec_is_refused_wherever_the_spec_stands(route: str, body: dict[str, Any], place: str) -> None:
    refused(application().post(route, json=body), place, "belongs into")


def test_other_plugins_may_have_their_own_names_where_the_spec_is_not() -> None:
    body = {"steering": SPEC, "vllm_xargs": {"scale": 2, "where": "there"}, "metadata": {"kind": "test"}}
    assert application().post("/v1/completions", json=body).json()["given"] == SPEC


@pytest.mark.parametrize(("module", "name"), PROTOCOLS.items())
def test_no_request_of_this_vllm_has_a_field_by_a_name_within_specs(module: str, name: str) -> None:
    model = getattr(importlib.import_module(module), name)
    assert not requests.KEYS_WITHIN & set(model.model_fields)


def test_the_token_route_reads_one_place_more() -> None:
    body = {"sampling_params": {"extra_args": {"steering": SPEC}}}
    assert application().post("/inference/v1/generate", json=body).json()["given"] == SPEC
    twice = application().post("/inference/v1/generate", json=body | {"steering": SPEC})
    refused(twice, "sampling_params.extra_args.steering", "twice")


@pytest.mark.parametrize(
    "text",
    [
        '{"steering": %s, "steering": null}',
        '{"steering": null, "steering": %s}',
        '{"ste\\u0065ring": %s, "steering": null}',
        '{"steering": {"interventions": [{"kind": "add", "vector": "calm", "scale": 1, "scale": 2}]}, "x": %s}',
    ],
)
def test_a_key_given_twice_is_refused_where_it_decides_about_steering(text: str) -> None:
    answer = application().post("/v1/completions", content=text.replace("%s", json.dumps(SPEC)), headers=JSON)
    refused(answer, "steering", "twice")
    ours = '{"model": "a", "model": "b", "prompt": "steering"}'
    assert application().post("/v1/completions", content=ours, headers=JSON).json()["body"]["model"] == "b"


def test_other_routes_refuse_an_escaped_name_and_a_body_of_any_type() -> None:
    client = application()
    for kind in ("application/json", "text/plain", "application/vnd.api+json"):
        content = '{"ste\\u0065ring": {}}'
        refused(client.post("/tokenize", content=content, headers={"Content-Type": kind}), "steering", "/tokenize")
    assert client.post("/tokenize", json={"prompt": 'say "steering": {}'}).status_code == 200


def test_what_cannot_be_read_is_a_400() -> None:
    for path in ("/v1/completions", "/tokenize"):
        for content in (b"[" * 990, b'{"a":' * 990 + b"1" + b"}" * 990, b'{"a": "\xff"}', b"9" * 10_000):
            assert application().post(path, content=content, headers=JSON).status_code in (400, 422), content[:9]


def test_query_parameters_and_headers_of_that_name_are_refused() -> None:
    client = application()
    refused(client.post("/v1/completions", params={"steering": "calm"}, json={}), "query.steering")
    within = client.post("/v1/completions", params={"vllm_xargs": json.dumps({"steering": "calm"})}, json={})
    refused(within, "query.vllm_xargs.steering")
    for header in ("X-Steering", "X_Steering", "X-Steer", "Steering-Vector", "X-Steering-Spec", "X-vLLM-Steering"):
        asked = client.post("/v1/completions", headers={header: "calm"}, json={})
        refused(asked, f"headers.{header.lower()}")
    more = {"x-traffic-steering": "eu", "x-request-id": "steering", "x-steering-admin-key": "k", "x-vllm": "1"}
    assert client.post("/v1/completions", params={"a": "steering"}, headers=more, json={}).status_code == 200


def test_a_form_is_read_once_and_its_fields_count_as_keys_do() -> None:
    client = application()

    def send(*fields: tuple[str, str]) -> Any:
        parts = [(name, (None, value)) for name, value in (("model", "m"), *fields)]
        return client.post("/v1/audio/transcriptions", files=[*parts, ("file", ("a.wav", b"RIFF"))])

    text = json.dumps(SPEC)
    assert send(("steering", text)).json() == {"given": text, "model": "m"}
    assert send(("vllm_xargs", json.dumps({"steering": text}))).json()["given"] == text
    assert send(("prompt", "steering")).json()["given"] is None
    refused(send(("steering", text), ("steering", "")), "steering", "twice")
    refused(send(("Steering", text)), "Steering")
    refused(send(("vllm_xargs", json.dumps({"steer": text}))), "vllm_xargs.steer")


def test_a_session_is_told_that_it_cannot_be_steered_and_goes_on() -> None:
    with application().websocket_connect("/v1/realtime") as socket:
        for event in (json.dumps({"session": {"steering": SPEC}}), '{"steering": {}, "steering": null}'):
            socket.send_text(event)
            answer = socket.receive_json()
            assert (answer["type"], answer["code"]) == ("error", "invalid_event")
            assert "a realtime session cannot be steered" in answer["error"]
        socket.send_json({"type": "session.update"})
        assert socket.receive_json() == {"heard": {"type": "session.update"}}


def test_without_steering_our_name_is_refused_and_others_are_left_to_other_plugins() -> None:
    requests.set_current_front_end(None)
    client = application()
    for body, place in (({"steering": SPEC}, "steering"), ({"extra_body": {"steering": SPEC}}, "extra_body.steering")):
        refused(client.post("/v1/completions", json=body), place, "--enable-steering")
        refused(client.post("/tokenize", json=body), place, "--enable-steering")
    for body in (
        {"steering_vectors": {}},
        {"vllm_xargs": {"hotwire": "[]"}},
        {"chat_template_kwargs": {"steering": 1}},
    ):
        assert client.post("/v1/completions", json=body, headers={"X-Steering": "1"}).status_code == 200


def test_routes_of_a_shape_that_we_do_not_know_stop_a_steered_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(app: FastAPI) -> None:
        raise AttributeError("APIRoute has no body_field")

    monkeypatch.setattr(routes, "guard_routes", unknown)
    with pytest.raises(AttributeError):
        routes.endpoint_plugin().attach_router(FastAPI())
    requests.set_current_front_end(None)
    app = FastAPI()
    before = list(app.routes)
    routes.endpoint_plugin().attach_router(app)
    assert app.routes == before


def test_refusals_are_counted(front_end: FrontEnd) -> None:
    counted: list[str] = []

    class Counts:
        def steered(self) -> None: ...

        def refused(self, reason: str) -> None:
            counted.append(reason)

    front_end._observer = Counts()
    client = application()
    client.post("/v1/completions", json={"steer": 1})
    client.post("/tokenize", json={"steering": {}})
    client.post("/v1/completions", content='{"steering": 1, "steering": 2}', headers=JSON)
    assert counted == ["place", "route", "twice"]
