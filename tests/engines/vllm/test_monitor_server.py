"""A monitor over HTTP: given as a flag, shown by the status page, named in receipts. Oracle: the embedded engine."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from vllm_server import WIDTH, make_model, serving

from trimtab import Probe, SteeredModel, SteeringVector
from trimtab.sites import HookPoint, Phase, Site

pytestmark = pytest.mark.vllm

RNG = np.random.default_rng(11)
CALM = SteeringVector({Site(layer, HookPoint.POST_BLOCK): RNG.normal(size=WIDTH) for layer in (1, 2)})
ANGER = Probe.at(Site(1, HookPoint.POST_BLOCK), RNG.normal(size=WIDTH), 0.25)
MONITOR = {"threshold": 0.5, "sharpness": 0.3}
PROMPT = [17, 203, 88, 41, 154, 9, 66, 230, 71, 120]
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("monitor")
    make_model(folder / "model")
    CALM.save(folder / "calm.safetensors")
    ANGER.save(folder / "anger.safetensors")
    (folder / "monitor.json").write_text(json.dumps({"probe": "anger.safetensors", **MONITOR}))
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serving(
        folder / "model", "--enable-steering", "--steering-vectors", f"calm={folder / 'calm.safetensors'}",
        "--steering-monitor", str(folder / "monitor.json"), log=folder / "server.log",
    ) as client:  # fmt: skip
        yield client


def test_answers_and_receipts_are_those_of_the_embedded_engine_behind_the_same_monitor(client, folder) -> None:
    loaded = {"vectors": {"calm": CALM}, "monitor": {"probe": ANGER, **MONITOR}}
    with SteeredModel.from_pretrained(folder / "model", **loaded) as embedded:
        for phase in ("all", "decode", "prefill"):
            spec = {"interventions": [{"kind": "add", "vector": "calm", "scale": 2.0, "phase": phase}]}
            (want,) = embedded.generate([PROMPT], spec, max_new_tokens=COUNT, do_sample=False)
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "steering": spec}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["choices"][0]["text"].split() == want.text.split()
            assert answer["steering"]["identity"] == {p.value: want.receipt.identity[p] for p in Phase}
            assert answer["steering"].get("monitor", "") == want.receipt.monitor
            assert bool(want.receipt.monitor) == (phase != "prefill")
            ours, theirs = answer["steering"].get("gates", []), want.receipt.gates
            assert [(use["gate"], use["probe"], use["tokens"]) for use in ours] == [
                (use.gate, "(monitor)", use.tokens) for use in theirs
            ]
            assert [use["mean"] for use in ours] == pytest.approx([use.mean for use in theirs], rel=1e-4)


def test_the_status_page_shows_the_monitor_and_which_workers_read_its_probe(client) -> None:
    page = client.get("/v1/steering").json()
    assert len(page["monitor"].pop("digest")) == 64
    assert page["monitor"] == {"probe": "anger.safetensors", "site": "post_block:1", "invert": False} | MONITOR
    assert [worker["probe_sites"] for worker in page["workers"]] == [["post_block:1"]]
    assert page["gates"] == {"per_phase": 0, "probe_sites": []}
