"""Real servers, one that steers and one that pools: no route answers a request for steering as if it had not asked."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm_server import LAYERS, SCALE_OUT, WIDTH, Oracle, make_model, serving

from trimtab.engines.vllm.http.before_routes import DOORS

pytestmark = pytest.mark.vllm

COUNT = 6

ROW = [0.4 * (-1) ** index for index in range(WIDTH)]

SPEC = {"interventions": [{"kind": "add", "vector": {"post_block": {str(layer): ROW for layer in range(LAYERS)}}}]}

STEERED = {layer: ROW for layer in range(LAYERS)}

PLACES = {"steering": {"steering": SPEC}, "vllm_xargs.steering": {"vllm_xargs": {"steering": json.dumps(SPEC)}}}

IGNORED = {  # what asks for steering in a place, or by a name, that no route reads
    "Steering": {"Steering": SPEC},
    "steerings": {"steerings": SPEC},
    "extra_body.steering": {"extra_body": {"steering": SPEC}},
    "extra_args.steering": {"extra_args": {"steering": SPEC}},
    "chat_template_kwargs.steering": {"chat_template_kwargs": {"steering": SPEC}},
    "steering_vectors": {"steering_vectors": {"post_block": {"0": ROW}}},
    "decode_steering_vectors": {"decode_steering_vectors": {"post_block": {"0": ROW}}},
    "vllm_xargs.apply_steering_vectors": {"vllm_xargs": {"apply_steering_vectors": "[]"}},
    "vllm_xargs.steer": {"vllm_xargs": {"steer": "{}"}},
    "vllm_xargs.hotwire": {"vllm_xargs": {"hotwire": "[]"}},
}

MESSAGES = [{"role": "user", "content": "w17 w203 w88"}]

BODIES = {  # of each route that takes a spec and no audio
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/batch": {"messages": [MESSAGES]},
    "/v1/chat/completions/render": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "w17 w203"},
    "/v1/completions/render": {"prompt": "w17 w203"},
    "/v1/messages": {"messages": MESSAGES},
    "/v1/messages/render": {"messages": MESSAGES},
    "/v1/responses": {"input": "w17 w203"},
    "/v1/responses/render": {"input": "w17 w203"},
    "/inference/v1/generate": {"token_ids": [17, 203], "sampling_params": {"max_tokens": COUNT}},
    "/invocations": {"prompt": "w17 w203"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "model"
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def steering(model: Path) -> Iterator[httpx.Client]:
    # Scale-out and development mode: as many routes as vLLM has.
    with serving(
        model, "--enable-steering", *SCALE_OUT,
        log=model.parent / "steering.log", environment={"VLLM_SERVER_DEV_MODE": "1"},
    ) as client:  # fmt: skip
        yield client


@pytest.fixture(scope="module")
def pooling(model: Path) -> Iterator[httpx.Client]:
    with serving(model, "--runner", "pooling", log=model.parent / "pooling.log") as client:
        yield client


def posts(client: httpx.Client) -> list[str]:
    """The routes that take a body, less our own."""
    paths = client.get("/openapi.json").json()["paths"]
    return [path for path, methods in paths.items() if "post" in methods and not path.startswith("/v1/steering")]


def body_of(path: str) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": COUNT, "temperature": 0, **BODIES.get(path, {})}


def assert_refused(answer: httpx.Response, path: str, place: str) -> None:
    assert answer.status_code == 400, (path, answer.text)
    error = answer.json()["error"]
    assert (error["param"], error["type"]) == (place, "BadRequestError")
    assert error["message"].startswith(f"{place}: {path} cannot be steered: leave the field out")


def refusals(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith('trimtab_requests_refused_total{reason="route"}')]
    return float(counts[0].split()[-1]) if counts else 0.0


@pytest.mark.parametrize("place", PLACES)
def test_every_route_that_takes_a_spec_steers_or_hands_it_on(steering, place: str):
    served = set(posts(steering))
    assert served >= set(BODIES)  # so that each is looked at below
    for path in BODIES:
        answer = steering.post(path, json=body_of(path) | PLACES[place])
        assert answer.status_code == 200, (path, answer.text)
        if path.endswith("/render"):
            rendered = answer.json() if isinstance(answer.json(), dict) else answer.json()[0]
            assert json.loads(rendered["sampling_params"]["extra_args"]["steering"]) == SPEC
        else:
            assert answer.headers["x-trimtab-steering"].count("=") == 2


@pytest.mark.parametrize("place", PLACES)
def test_every_other_route_refuses_and_names_the_field(steering, place: str):
    others = [path for path in posts(steering) if path not in DOORS and path != "/invocations"]
    assert {"/tokenize", "/generative_scoring", "/v1/messages/count_tokens", "/v1/systemone"} <= set(others)
    before = refusals(steering)
    for path in others:
        answer = steering.post(path.replace("{response_id}", "x"), json=body_of(path) | PLACES[place])
        assert_refused(answer, path, place)
    assert refusals(steering) == before + len(others)


def test_no_route_ignores_what_can_only_mean_steering(steering):
    for path in BODIES:
        for place, asked in IGNORED.items():
            answer = steering.post(path, json=body_of(path) | asked)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, place), (path, answer.text)
        text = json.dumps(body_of(path))[:-1] + f', "steering": {json.dumps(SPEC)}, "steering": null}}'
        answer = steering.post(path, content=text, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering"), (path, answer.text)
    nested = [{"role": "user", "content": [{"type": "text", "text": "w17", "steering": SPEC}]}]
    for path in ("/v1/chat/completions", "/v1/messages"):
        answer = steering.post(path, json=body_of(path) | {"messages": nested})
        assert answer.json()["error"]["param"] == "messages[0].content[0].steering"
    inner = {"sampling_params": {"extra_args": {"steering": SPEC}}}
    assert steering.post("/v1/completions", json=body_of("/v1/completions") | inner).status_code == 400


def test_what_does_not_ask_for_steering_is_answered_as_ever(steering):
    told = steering.post("/tokenize", json={"model": "tiny", "prompt": 'w17 "steering" w203', "steering": None})
    assert (told.status_code, told.json()["count"]) == (200, 3)
    scoring = {"model": "tiny", "query": "w17", "items": ["w203", "w88"], "label_token_ids": [4, 5]}
    assert len(steering.post("/generative_scoring", json=scoring).json()["data"]) == 2
    escaped = steering.post(
        "/tokenize", content=b'{"prompt": "w17", "ste\\u0065ring": {}}', headers={"Content-Type": "application/json"}
    )
    assert_refused(escaped, "/tokenize", "steering")
    for path in ("/tokenize", "/v1/completions", "/v1/steering/vectors", "/v1/steering/probes"):
        for deep in (b"[" * 990 + b"]" * 990, b'{"steering":' * 990 + b"1" + b"}" * 990):
            told = steering.post(path, content=deep, headers={"Content-Type": "application/json"})
            assert told.status_code == 400, (path, told.text)
    broken = steering.post("/tokenize", content=b'{"steering', headers={"Content-Type": "application/json"})
    assert broken.status_code in (400, 422)
    assert "cannot be steered" not in broken.text


def test_a_rendered_message_carries_its_spec_to_the_server_that_answers_it(steering, model):
    rendered = steering.post("/v1/messages/render", json=body_of("/v1/messages/render") | {"steering": SPEC}).json()
    answer = steering.post("/inference/v1/generate", json=rendered).json()
    words = " ".join(f"w{token}" for token in answer["choices"][0]["token_ids"])
    oracle = Oracle(model)
    assert words == oracle.words("w17 w203 w88 w3", COUNT, STEERED, STEERED)  # the template adds w3
    assert words != oracle.words("w17 w203 w88 w3", COUNT)


@pytest.mark.parametrize("place", PLACES)
def test_a_server_without_steering_refuses_too_and_answers_the_rest(pooling, place: str):
    bodies = {
        "/v1/embeddings": {"input": "w17 w203"},
        "/pooling": {"input": "w17 w203"},
        "/v1/score": {"text_1": "w17", "text_2": "w203"},
        "/invocations": {"input": "w17 w203"},
        "/tokenize": {"prompt": "w17 w203"},
    }
    assert pooling.get("/v1/steering").status_code == 404
    for path, body in bodies.items():
        assert pooling.post(path, json={"model": "tiny", **body}).status_code == 200, path
        answer = pooling.post(path, json={"model": "tiny", **body} | PLACES[place])
        assert_refused(answer, path, place)
        assert answer.json()["error"]["message"].endswith("of a server with --enable-steering")
    for path in posts(pooling):
        assert_refused(pooling.post(path, json={"model": "tiny"} | PLACES[place]), path, place)
