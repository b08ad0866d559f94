"""Audio forms, realtime sessions and lines of batches, in vLLM's own classes and without an engine."""

import asyncio
import inspect
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimtab.engines.vllm import plugin
from trimtab.engines.vllm.carried import Carried
from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.serving.registry import VectorRegistry
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.vectors.vector import SteeringVector

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient

try:
    from vllm.entrypoints.launchers import run_batch
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
except ModuleNotFoundError:  # 0.26
    from vllm.entrypoints.openai import run_batch
    from vllm.entrypoints.openai.engine.protocol import ErrorInfo, ErrorResponse
    from vllm.entrypoints.serve.utils.server_utils import exception_handler

    def init_exception_handler(app: Any) -> None:
        app.exception_handler(Exception)(exception_handler)


from vllm.entrypoints.speech_to_text.realtime import api_router as realtime
from vllm.entrypoints.speech_to_text.transcription import api_router as transcription
from vllm.entrypoints.speech_to_text.translation import api_router as translation

from trimtab.engines.vllm.http.before_routes import guard_routes

pytestmark = pytest.mark.vllm

SPEC = {"interventions": [{"kind": "add", "vector": "calm", "scale": 2.0}]}
UNKNOWN = {"interventions": [{"kind": "add", "vector": "nobody"}]}
PLACES = ["steering", "vllm_xargs"]


@pytest.fixture(autouse=True)
def front_end() -> Iterator[FrontEnd]:
    plugin.register()
    calm = SteeringVector({Site(0, HookPoint.POST_BLOCK): np.arange(1.0, 9.0)})
    front_end = FrontEnd(ModelSites(8, 2, frozenset({Site(0, HookPoint.POST_BLOCK)})), VectorRegistry({"calm": calm}))
    requests.set_current_front_end(front_end)
    yield front_end
    requests.set_current_front_end(None)


class Audio:
    """Stands for vLLM's audio handlers, which need a model that hears: makes sampling parameters as they do."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    async def create(self, audio: bytes, request: Any, raw_request: Any) -> Any:
        make = request.to_beam_search_params if request.use_beam_search else request.to_sampling_params
        self.made.append(make(5, {}))
        return ErrorResponse(error=ErrorInfo(message="no model", type="Test", code=418))

    create_transcription = create_translation = create


@pytest.fixture
def audio() -> Audio:
    return Audio()


@pytest.fixture
def client(audio: Audio) -> TestClient:
    app = FastAPI()
    app.include_router(transcription.router)
    app.include_router(translation.router)
    init_exception_handler(app)
    app.state.openai_serving_transcription = app.state.openai_serving_translation = audio
    app.state.enable_server_load_tracking = False
    app.state.args = SimpleNamespace(log_error_stack=False)
    return TestClient(app, raise_server_exceptions=False)


def form(place: str, spec: Any) -> dict[str, str]:
    return {place: json.dumps(spec if place == "steering" else {"steering": json.dumps(spec)})}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
class TestAudioForms:
    def send(self, client: TestClient, path: str, fields: dict[str, str]) -> Any:
        return client.post(path, data={"model": "m", **fields}, files={"file": ("a.wav", b"RIFF")})

    def test_a_spec_in_a_form_is_admitted(self, client: TestClient, audio: Audio, path: str, place: str) -> None:
        assert self.send(client, path, form(place, SPEC)).status_code == 418
        assert self.send(client, path, {}).status_code == 418
        steered, plain = audio.made
        assert isinstance(steered.extra_args["steering"], Carried)
        assert not plain.extra_args

    def test_a_bad_one_is_a_400_before_any_stream(
        self, client: TestClient, audio: Audio, path: str, place: str
    ) -> None:
        answer = self.send(client, path, {"stream": "true", **form(place, UNKNOWN)})
        assert (answer.status_code, audio.made) == (400, [])
        assert answer.json()["error"]["param"] == "steering.interventions[0].vector"

    def test_beam_search_is_refused(self, client: TestClient, audio: Audio, path: str, place: str) -> None:
        answer = self.send(client, path, {"use_beam_search": "true", **form(place, SPEC)})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "use_beam_search")


def test_a_realtime_session_is_told_that_it_cannot_be_steered() -> None:
    app = FastAPI()
    app.include_router(realtime.router)
    app.state.openai_serving_realtime = SimpleNamespace(_is_model_supported=lambda model: model == "m")
    guard_routes(app)
    update = {"type": "session.update", "model": "m"}
    asked = [
        ({"steering": SPEC}, "steering"),
        ({"vllm_xargs": {"steering": json.dumps(SPEC)}}, "vllm_xargs.steering"),
        ({"session": {"steering": SPEC}}, "session.steering"),
    ]
    with TestClient(app).websocket_connect("/v1/realtime") as socket:
        assert socket.receive_json()["type"] == "session.created"
        for more, place in asked:
            socket.send_json(update | more)
            answer = socket.receive_json()
            assert answer["type"] == "error"
            assert answer["error"].startswith(f"{place}: a realtime session cannot be steered")
        commit = {"type": "input_audio_buffer.commit"}
        socket.send_json(commit)
        assert socket.receive_json()["code"] == "model_not_validated"  # since no update reached the session
        socket.send_json(update)
        socket.send_json(commit | {"final": True})
        socket.send_json({"type": "unknown"})
        assert socket.receive_json()["code"] == "unknown_event"


class TestBatches:
    def run(self, url: str, body: dict[str, Any], replace: dict[str, str] | None = None) -> Any:
        async def answer(request: Any) -> Any:
            if hasattr(request, "to_sampling_params"):
                request.to_sampling_params(5, {})
            return ErrorResponse(error=ErrorInfo(message="no model", type="Test", code=418))

        text = json.dumps({"custom_id": "1", "method": "POST", "url": url, "body": {"model": "m", **body}})
        for ours, theirs in (replace or {}).items():
            text = text.replace(ours, theirs)
        line = run_batch.BatchRequestInput.model_validate_json(text)
        takes_one = "tracker" in inspect.signature(run_batch.run_request).parameters  # until 0.32
        tracker = [run_batch.BatchProgressTracker()] if takes_one else []
        return asyncio.run(run_batch.run_request(answer, line, *tracker)).response.status_code

    @pytest.mark.parametrize("more", [{"steering": SPEC}, {"vllm_xargs": {"steering": json.dumps(SPEC)}}])
    def test_a_line_that_is_not_sampled_is_refused(self, more: dict[str, Any]) -> None:
        for url, body in {
            "/v1/embeddings": {"input": "x"},
            "/v1/score": {"text_1": "x", "text_2": "y"},
            "/v1/rerank": {"query": "x", "documents": ["y"]},
        }.items():
            assert self.run(url, body) == 418
            assert self.run(url, body | more) == 400

    def test_a_line_that_is_sampled_is_admitted_or_refused_by_its_spec(self) -> None:
        chat = {"messages": [{"role": "user", "content": "x"}]}
        heard = {"file_url": "data:audio/wav;base64,AAAA"}
        for url, body in {"/v1/chat/completions": chat, "/v1/audio/transcriptions": heard}.items():
            assert self.run(url, body | {"steering": SPEC}) == 418
            assert self.run(url, body | {"steering": UNKNOWN}) == 400

    def test_a_line_is_searched_as_a_body_is(self) -> None:
        chat, url = {"messages": [{"role": "user", "content": "steering"}]}, "/v1/chat/completions"
        assert self.run(url, chat) == 418
        for more in ({"Steering": SPEC}, {"extra_body": {"steering": SPEC}}, {"vllm_xargs": {"hotwire": "[]"}}):
            assert self.run(url, chat | more) == 400
        assert self.run(url, chat | {"steering": SPEC}, {'"steering":': '"ste\\u0065ring":'}) == 418
        twice = {'"model"': '"steering": null, "model"'}
        assert self.run(url, {**chat, "steering": SPEC}, twice) == 400
        for where, body in {"/v1/embeddings": {"input": "x"}, "/v1/score": {"text_1": "x", "text_2": "y"}}.items():
            assert self.run(where, body | {"steering": SPEC}, twice) == 400
