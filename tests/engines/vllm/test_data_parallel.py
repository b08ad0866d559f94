"""Two data-parallel engines behind one server: both are steered, and status, receipts and metrics know both."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from vllm_server import WIDTH, Oracle, make_model, serving

from trimtab import Probe
from trimtab.sites import HookPoint, Site

pytestmark = pytest.mark.vllm

RNG = np.random.default_rng(23)
ROWS = RNG.normal(size=(20, WIDTH)).astype(np.float32)
ANGER = Probe.at(Site(0, HookPoint.POST_BLOCK), RNG.normal(size=WIDTH))

PROMPT = "w17 w203 w88 w41"

COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data-parallel")
    make_model(folder / "model")
    ANGER.save(folder / "anger.safetensors")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serving(
        folder / "model", "--enable-steering", "--steering-probes", f"anger={folder / 'anger.safetensors'}",
        "--data-parallel-size", "2", "--api-server-count", "1", "--steering-max-rows", "9", log=folder / "server.log",
    ) as client:  # fmt: skip
        yield client


def ask(client: httpx.Client, engine: int, row: int, count: int = COUNT, **more: Any) -> dict[str, Any]:
    step = {"kind": "add", "vector": {"post_block": {"1": ROWS[row].tolist()}}, **more}
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": count, "temperature": 0}
    answer = client.post(
        "/v1/completions",
        json=body | {"steering": {"interventions": [step]}},
        headers={"X-data-parallel-rank": str(engine)},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def uploads(client: httpx.Client) -> dict[int, int]:
    workers = client.get("/v1/steering").json()["workers"]
    assert [(worker["engine"], worker["rank"]) for worker in workers] == [(0, 0), (1, 0)]
    return {worker["engine"]: worker["row_uploads"] for worker in workers}


def metric(client: httpx.Client, name: str) -> float:
    time.sleep(1.1)  # the page reuses what workers said for a second
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def becomes(client: httpx.Client, name: str, value: float) -> bool:
    """Whether a metric comes to a value: where a worker is busy, the page shows what it said before."""
    return any(metric(client, name) == value for _ in range(30))


@pytest.mark.parametrize("engine", [0, 1])
def test_an_engine_steers_and_the_status_shows_which_one(client, folder, engine: int):
    before = uploads(client)
    expected = Oracle(folder / "model").words(PROMPT, COUNT, {1: ROWS[engine]}, {1: ROWS[engine]})
    assert ask(client, engine, engine)["choices"][0]["text"].strip() == expected
    after = uploads(client)
    assert after[engine] > before[engine]
    assert after[1 - engine] == before[1 - engine]


def test_engines_that_saw_different_requests_are_in_order(client):
    ask(client, 0, 2)
    ask(client, 1, 3)
    status = client.get("/v1/steering").json()
    assert len({worker["digest"] for worker in status["workers"]}) == 2
    assert status["workers_agree"] is True  # each engine's own, which is one here


@pytest.mark.parametrize("engine", [0, 1])
def test_gates_report_from_the_engine_that_evaluated_them(client, engine: int):
    tokens = metric(client, "trimtab_gate_tokens_total")
    answer = ask(client, engine, 4, gate={"probe": "anger", "threshold": 0.5})
    (told,) = answer["steering"]["gates"]
    assert told["tokens"] == len(PROMPT.split()) + COUNT - 1
    assert client.get(f"/v1/steering/gates/{answer['id']}").json()["gates"] == [told]
    assert becomes(client, "trimtab_gate_tokens_total", tokens + told["tokens"])


def test_requests_wait_in_the_engine_whose_rows_they_need_and_all_are_answered(client, folder):
    count, oracle = 60, Oracle(folder / "model")
    pages: list[dict[str, Any]] = []
    with ThreadPoolExecutor(2 * len(ROWS)) as pool:
        asked = [pool.submit(ask, client, i % 2, i // 2, count) for i in range(2 * len(ROWS))]
        while not all(answer.done() for answer in asked):
            pages.append(client.get("/v1/steering").json()["tables"])
    assert {page["rows"] for page in pages} == {8}
    for engine in (0, 1):
        told = [one for page in pages for one in page["engines"] if one["engine"] == engine]  # none where it is busy
        assert max(one["requests_waiting"] for one in told) > 0
        assert max(one["rows_reserved"] for one in told) <= 8
    texts = [answer.result()["choices"][0]["text"].strip() for answer in asked]
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) > 10
    assert texts[2 * 7] == oracle.words(PROMPT, count, {1: ROWS[7]}, {1: ROWS[7]})
    tables = client.get("/v1/steering").json()["tables"]
    assert [(one["engine"], one["rows_reserved"], one["requests_waiting"]) for one in tables["engines"]] == [
        (0, 0, 0), (1, 0, 0)
    ]  # fmt: skip
    assert all(one["most_bytes_of_a_device"] > 0 for one in tables["engines"])
    assert becomes(client, "trimtab_requests_waiting_for_rows", 0)
    assert becomes(client, "trimtab_rows_reserved", 0)


def test_metrics_add_up_over_engines(client):
    workers = client.get("/v1/steering").json()["workers"]
    assert becomes(client, "trimtab_row_capacity", sum(worker["capacity"] for worker in workers))
    assert becomes(client, "trimtab_row_uploads_total", sum(uploads(client).values()))
    assert becomes(client, "trimtab_rows_in_use", 0)
