"""Looking at a server must never change it: workers that stand still, receipts of every route, ids that callers choose.

Its worker is a process of its own. The oracle is the embedded engine on the same weights.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from vllm_server import SCALE_OUT, WIDTH, Server, make_model

from trimtab import Probe, SteeredModel, SteeringVector
from trimtab.sites import HookPoint, Phase, Site

pytestmark = pytest.mark.vllm

RNG = np.random.default_rng(12)
CALM = SteeringVector({Site(layer, HookPoint.POST_BLOCK): RNG.normal(size=WIDTH) for layer in (1, 2)})
ANGER = Probe.at(Site(1, HookPoint.POST_BLOCK), RNG.normal(size=WIDTH), 0.25)
SHORT = [17, 203, 88, 41, 154, 9, 66, 230, 71, 120]
LONG = [3 + 7 * place % 250 for place in range(75)]  # two blocks of the cache and a piece
WORDS = " ".join(f"w{token}" for token in SHORT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("observing")
    make_model(folder / "model")
    CALM.save(folder / "calm.safetensors")
    ANGER.save(folder / "anger.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(
        folder / "model", "--enable-steering", "--steering-vectors", f"calm={folder / 'calm.safetensors'}",
        "--steering-probes", f"anger={folder / 'anger.safetensors'}", "--steering-probe-layers", "0",
        "--distributed-executor-backend", "mp", *SCALE_OUT, log=folder / "server.log",
        environment={"VLLM_WORKER_MULTIPROC_METHOD": "spawn"},  # as vLLM does
    )  # fmt: skip
    server.wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def embedded(folder: Path) -> Iterator[SteeredModel]:
    with SteeredModel.from_pretrained(folder / "model", vectors={"calm": CALM}, probes={"anger": ANGER}) as model:
        yield model


def add(phase: str = "all", gate: Any = None) -> dict[str, Any]:
    step = {"kind": "add", "vector": "calm", "scale": 2.0, "phase": phase}
    return {"interventions": [step | ({} if gate is None else {"gate": gate})]}


GATED = add(gate={"probe": "anger", "threshold": 0.5})


def complete(client: httpx.Client, prompt: Any, count: int, steering: Any, **more: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": count, "temperature": 0, "steering": steering}
    answer = client.post("/v1/completions", json=body | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data:").strip() for line in answer.text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def counts(embedded: SteeredModel, prompts: list[list[int]], count: int, steering: Any, **more: Any) -> dict[str, int]:
    """What the embedded engine counts for all of its outputs together."""
    outputs = embedded.generate(prompts, steering, max_new_tokens=count, do_sample=False, **more)
    return {phase.value: sum(output.receipt.steered_tokens[phase] for output in outputs) for phase in Phase}


# --- workers that stand still


@contextmanager
def standing_still(server: Server) -> Iterator[None]:
    """The workers, those processes below an engine core, stop in the block."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    workers = [process for process in family if "Worker" in " ".join(process.cmdline())]
    assert workers, [process.cmdline() for process in family]
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            os.kill(worker.pid, signal.SIGCONT)


def test_an_engine_survives_being_looked_at_while_its_worker_stands_still(server, client, embedded) -> None:
    (want,) = embedded.generate([SHORT], GATED, max_new_tokens=8, do_sample=False)
    before = complete(client, SHORT, 8, GATED)
    with standing_still(server):
        for _ in range(3):
            scraped = httpx.get(f"{server.url}/metrics", timeout=60)  # without a key
            assert scraped.status_code == 200
        assert "trimtab_engines_silent 1.0" in scraped.text
        page = client.get("/v1/steering").json()
        assert (page["engines_silent"], page["workers"]) == ([0], [])
        assert [vector["name"] for vector in page["vectors"]] == ["calm"]
        asked = client.get(f"/v1/steering/gates/{before['id']}")
        assert asked.status_code == 503
    for _ in range(4):  # each reply belongs to its own call
        after = complete(client, SHORT, 8, GATED)
        assert after["choices"][0]["text"].split() == want.text.split()
        assert after["steering"] == before["steering"]
        page = client.get("/v1/steering").json()
        assert (page["engines_silent"], len(page["workers"]), page["workers_agree"]) == ([], 1, True)
    assert client.get(f"/v1/steering/gates/{before['id']}").json()["gates"] == before["steering"]["gates"]


def test_no_row_is_held_by_an_idle_engine(client) -> None:
    complete(client, [SHORT, LONG], 3, add())
    (worker,) = client.get("/v1/steering").json()["workers"]
    assert worker["rows_in_use"] == 0


# --- what was steered is counted as the embedded engine counts it


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_steered_tokens_are_those_of_the_embedded_engine(client, embedded, phase, count) -> None:
    want = counts(embedded, [SHORT, LONG], count, add(phase))
    for _ in range(2):  # the second time the prompt comes out of the cache: it was steered when it went in
        told = complete(client, [SHORT, LONG], count, add(phase))["steering"]
        assert told["steered_tokens"] == want
    assert (count > 1 or phase != "decode") == any(want.values())


def test_each_choice_counts_its_prompt_and_its_tokens(client, embedded) -> None:
    want = counts(embedded, [SHORT] * 3, 5, add())
    assert complete(client, SHORT, 5, add(), n=3, temperature=0.7)["steering"]["steered_tokens"] == want


def test_an_answer_that_a_stop_string_or_token_ends_counts_what_it_holds(client, embedded) -> None:
    words = complete(client, SHORT, 9, add())["choices"][0]["text"].split()
    place = next(place for place in range(1, 9) if words[place] not in words[:place])
    token = int(words[place][1:])
    want = counts(embedded, [SHORT], 9, add(), eos_token_id=token)
    assert want == {"prefill": 10, "decode": place}
    for end in ({"stop": [words[place]]}, {"stop_token_ids": [token]}):
        stopped = complete(client, SHORT, 9, add(), **end)
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["steering"]["steered_tokens"] == want


CHAT = {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 6, "temperature": 0}
ROUTES = {  # body, and where the tokens of the prompt are 11: the template adds one
    "/v1/completions": ({"prompt": [*SHORT, 3], "max_tokens": 6, "temperature": 0}),
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": WORDS, "max_output_tokens": 6, "temperature": 0},
    "/inference/v1/generate": {
        "token_ids": [*SHORT, 3],
        "sampling_params": {"max_tokens": 6, "temperature": 0.0},
    },
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_tells_what_was_steered_in_whole_answers_and_in_the_last_event_of_streams(
    client, embedded, route, stream
) -> None:
    want = counts(embedded, [[*SHORT, 3]], 6, GATED)
    answer = client.post(route, json={"model": "tiny", **ROUTES[route], "stream": stream, "steering": GATED})
    assert answer.status_code == 200, answer.text
    documents = events(answer) if stream else [answer.json()]
    assert ["steering" in document for document in documents] == [False] * (len(documents) - 1) + [True]
    told = documents[-1]["steering"]
    assert told["steered_tokens"] == want == {"prefill": 11, "decode": 5}
    (use,) = told["gates"]
    assert (use["probe"], use["tokens"]) == ("anger", 16)
    assert answer.headers["x-trimtab-steering"].startswith(f"prefill={told['identity']['prefill']}")
    by_name = client.get(f"/v1/steering/gates/{answer.headers['x-trimtab-answer']}").json()
    assert by_name["gates"] == told["gates"]
    place = documents[0]
    answer_id = [p.get("id") or p.get("request_id") for p in (place, place.get("response"), place.get("message")) if p]
    by_id = client.get(f"/v1/steering/gates/{next(filter(None, answer_id))}").json()
    assert by_id["gates"] == told["gates"]


def test_an_unsteered_stream_passes_as_it_is(client) -> None:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": SHORT, "max_tokens": 3, "stream": True})
    assert not any("steering" in event for event in events(answer))
    assert "x-trimtab-steering" not in answer.headers


# --- ids that callers choose


def test_ids_are_matched_whole_and_answers_that_share_one_keep_their_own_counts(client) -> None:
    def ask(request_id: str, count: int) -> dict[str, Any]:
        headers = {"X-Request-Id": request_id}
        body = {"model": "tiny", "prompt": SHORT, "max_tokens": count, "temperature": 0, "steering": GATED}
        return client.post("/v1/completions", json=body, headers=headers).json()

    answers = {name: ask(name, count) for count, name in enumerate(("a", "a-b", "0_a", "a-0", ".*"), 2)}
    for count, answer in enumerate(answers.values(), 2):
        assert answer["steering"]["gates"][0]["tokens"] == len(SHORT) + count - 1
        again = client.get(f"/v1/steering/gates/{answer['id']}").json()
        assert again["gates"] == answer["steering"]["gates"]
    twin = ask("a", 7)
    assert twin["id"] == answers["a"]["id"]
    assert twin["steering"]["gates"][0]["tokens"] == len(SHORT) + 6
    asked = client.get(f"/v1/steering/gates/{twin['id']}")
    assert asked.status_code == 409
    assert "several answers" in asked.json()["error"]["message"]
    assert client.get("/v1/steering/gates/never-seen").status_code == 404


def test_metrics_name_registered_probes_and_sum_all_inline_ones(client) -> None:
    def inline(seed: int) -> dict[str, Any]:
        direction = np.random.default_rng(seed).normal(size=WIDTH).tolist()
        return add(gate={"probe": {"post_block": {"0": direction}}, "threshold": 0.5})

    late = {"post_block": {"0": RNG.normal(size=WIDTH).tolist()}}
    assert client.post("/v1/steering/probes", json={"name": "late", "probe": late}).status_code == 201
    for seed in range(5):
        complete(client, SHORT, 1, inline(seed))
    complete(client, SHORT, 1, add(gate={"probe": "late", "threshold": 0.5}))
    (worker,) = client.get("/v1/steering").json()["workers"]
    uses = {use["probe"]: use["tokens"] for use in worker["gates"]}
    assert uses.keys() == {"anger", "late", "(inline)"}
    assert (uses["late"], uses["(inline)"]) == (10, 50)
    client.delete("/v1/steering/probes/late")
