"""Two API server processes in front of one engine: one registry between them, a default spec for every request."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from vllm_server import KEY, LAYERS, WIDTH, Oracle, Server, make_model

from trimtab.vectors.vector import SteeringVector

pytestmark = pytest.mark.vllm

NUMBERS = np.random.default_rng(3).normal(size=(3, LAYERS, WIDTH)).astype(np.float32)

CALM, JOY, FEAR = ({layer: block[layer] for layer in range(LAYERS)} for block in NUMBERS)

PROMPT = "w17 w203 w88 w41 w154 w9"

COUNT = 8

BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    make_model(folder / "model")
    SteeringVector({(layer, "post_block"): row for layer, row in CALM.items()}).save(folder / "calm.safetensors")
    (folder / "default.json").write_text(json.dumps(add("calm", scale=0.5, phase="decode")))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    (folder / "temporary").mkdir()
    server = Server(
        folder / "model", "--enable-steering", "--steering-vectors", f"calm={folder / 'calm.safetensors'}",
        "--steering-default", str(folder / "default.json"), "--api-server-count", "2",
        log=folder / "server.log", environment={"TMPDIR": str(folder / "temporary")},
    )  # fmt: skip
    server.wait(processes=2)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder / "model")


def add(source: Any, **more: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": source, **more}]}


def lists(rows: dict[int, np.ndarray]) -> dict[str, Any]:
    return {"post_block": {str(layer): row.tolist() for layer, row in rows.items()}}


def send(server: Server, method: str, path: str, **more: Any) -> httpx.Response:
    """One request on a connection of its own: the kernel gives it to either API server."""
    return httpx.request(method, server.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=600, **more)


def text(server: Server, steering: dict[str, Any] | None = None) -> str:
    body = BODY if steering is None else {**BODY, "steering": steering}
    return send(server, "POST", "/v1/completions", json=body).json()["choices"][0]["text"].strip()


def decoded(*parts: tuple[float, dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    return {layer: sum(np.float32(scale) * rows[layer] for scale, rows in parts) for layer in range(LAYERS)}


def test_the_default_is_added_to_every_request(server, oracle):
    half = decoded((0.5, CALM))
    assert oracle.words(PROMPT, COUNT, {}, half) != oracle.words(PROMPT, COUNT)
    for _ in range(6):
        assert text(server) == oracle.words(PROMPT, COUNT, {}, half)
        assert text(server, add(lists(JOY))) == oracle.words(PROMPT, COUNT, JOY, decoded((0.5, CALM), (1, JOY)))


def test_a_name_registered_at_one_process_means_the_same_at_the_other(server, oracle):
    for rows, status in ((JOY, 201), (FEAR, 200)):
        answer = send(server, "POST", "/v1/steering/vectors", json={"name": "mood", "vector": lists(rows)})
        assert answer.status_code == status
        expected = oracle.words(PROMPT, COUNT, rows, decoded((0.5, CALM), (1, rows)))
        assert [text(server, add("mood")) for _ in range(12)] == [expected] * 12
    assert send(server, "DELETE", "/v1/steering/vectors/mood").status_code == 200
    refused = [send(server, "POST", "/v1/completions", json={**BODY, "steering": add("mood")}) for _ in range(12)]
    assert {answer.status_code for answer in refused} == {400}


def test_both_processes_take_part(folder, server):
    # Each process counts in a file of its own; without this the other tests might have met one process alone.
    def counts() -> dict[str, float]:
        found: dict[str, float] = {}
        for file in (folder / "temporary").glob("*/counter_*.db"):
            for family in MultiProcessCollector.merge([str(file)], accumulate=True):
                if family.name == "trimtab_requests_steered":
                    found[str(file)] = sum(sample.value for sample in family.samples)
        return found

    for _ in range(64):  # the kernel chooses, one connection at a time
        if sum(count > 0 for count in counts().values()) == 2:
            break
        text(server)
    assert sum(count > 0 for count in counts().values()) == 2, counts()


def test_what_the_default_names_can_be_neither_overwritten_nor_deleted_at_either_process(server, oracle):
    zeros = {layer: np.zeros(WIDTH, np.float32) for layer in range(LAYERS)}
    for _ in range(4):
        written = send(server, "POST", "/v1/steering/vectors", json={"name": "calm", "vector": lists(zeros)})
        assert (written.status_code, written.json()["error"]["param"]) == (409, "name")
        assert send(server, "DELETE", "/v1/steering/vectors/calm").status_code == 409
        assert text(server) == oracle.words(PROMPT, COUNT, {}, decoded((0.5, CALM)))


def test_beam_search_is_refused_since_the_default_would_steer_it(server):
    answer = send(server, "POST", "/v1/completions", json={**BODY, "use_beam_search": True, "n": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "use_beam_search")


def test_metrics_add_up_over_the_processes(server):
    def value(name: str) -> float:
        page = send(server, "GET", "/metrics").text
        found = [line for line in page.splitlines() if line.split("{")[0].split(" ")[0] == name]
        assert len(found) <= 1, found
        return float(found[0].rsplit(" ", 1)[1]) if found else 0.0

    before = value("trimtab_requests_steered_total")
    for _ in range(10):
        text(server)
    assert value("trimtab_requests_steered_total") == before + 10
    assert value("trimtab_row_capacity") >= 2 * 16


def test_shut_down_leaves_neither_process_nor_registry(server, folder):
    assert list((folder / "temporary").glob("trimtab-registry-*"))
    assert server.stop() == []
    assert not list((folder / "temporary").glob("trimtab-registry-*"))
