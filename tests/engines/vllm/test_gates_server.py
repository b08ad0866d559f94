"""Gates and slots over HTTP: probes by name, inline and registered later; what gates did; refusals; metrics.

The oracle is the embedded engine on the same weights.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from vllm_server import LAYERS, WIDTH, make_model, serving

from trimtab import Probe, SteeredModel, SteeringVector
from trimtab.sites import HookPoint, Site

pytestmark = pytest.mark.vllm

RNG = np.random.default_rng(11)
CALM = SteeringVector({Site(layer, HookPoint.POST_BLOCK): RNG.normal(size=WIDTH) for layer in (1, 2)})
ANGER, JOY, LATE = (Probe.at(Site(layer, HookPoint.POST_BLOCK), RNG.normal(size=WIDTH), 0.25) for layer in (1, 0, 3))
PROMPT = [17, 203, 88, 41, 154, 9, 66, 230, 71, 120]
COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    make_model(folder / "model")
    CALM.save(folder / "calm.safetensors")
    ANGER.save(folder / "anger.safetensors")
    JOY.save(folder / "joy.safetensors")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serving(
        folder / "model", "--enable-steering", "--steering-vectors", f"calm={folder / 'calm.safetensors'}",
        "--steering-probes", f"anger={folder / 'anger.safetensors'}", "--steering-probe-layers", "0",
        "--steering-gates", "2", "--steering-slots", "1", "--steering-slot-layers", "1-2",
        "--steering-kinds", "clamp", "swap", log=folder / "server.log",
    ) as client:  # fmt: skip
        yield client


@pytest.fixture(scope="module")
def embedded(folder: Path) -> Iterator[SteeredModel]:
    names = {"anger": ANGER, "joy": JOY}
    with SteeredModel.from_pretrained(folder / "model", vectors={"calm": CALM}, probes=names) as model:
        yield model


def gated(probe: Any, **options: Any) -> dict[str, Any]:
    gate = {"probe": probe, "threshold": 0.5} | options
    return {"interventions": [{"kind": "add", "vector": "calm", "scale": 2.0, "gate": gate}]}


def inline_at(layer: int) -> dict[str, Any]:
    return {"post_block": {str(layer): LATE.direction.tolist()}}


def ask(client: httpx.Client, steering: Any, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": COUNT, "temperature": 0, "steering": steering}
    return client.post("/v1/completions", json=body | more)


def expected(embedded: SteeredModel, steering: Any) -> Any:
    (output,) = embedded.generate([PROMPT], steering, max_new_tokens=COUNT, do_sample=False)
    return output


def inline(probe: Probe) -> dict[str, Any]:
    return {probe.site.hook.value: {str(probe.site.layer): probe.direction.tolist()}, "bias": probe.bias}


@pytest.mark.parametrize("spec", [gated("anger"), gated("anger", hard=True, invert=True), gated(inline(JOY))])
def test_a_gated_request_answers_as_the_embedded_engine_and_says_what_its_gate_did(client, embedded, spec) -> None:
    answer, want = ask(client, spec).json(), expected(embedded, spec)
    assert answer["choices"][0]["text"].split() == want.text.split()
    check_receipt(answer, want)
    again = client.get(f"/v1/steering/gates/{answer['id']}").json()
    assert again["gates"] == answer["steering"]["gates"]
    (named,) = answer["steering"]["probes"]
    assert named["name"] == (spec["interventions"][0]["gate"]["probe"] if named["name"] else None)


def check_receipt(answer: dict[str, Any], want: Any) -> None:
    """Both engines give the same receipt, but for the last digits of the mean of a gate's factors."""
    receipt, told = want.receipt.as_json(), dict(answer["steering"])
    (use,), (gate,) = receipt.pop("gates"), told.pop("gates")
    assert told == receipt
    assert gate == use | {"mean": pytest.approx(use["mean"], abs=1e-4)}


def test_a_probe_registered_later_is_read_by_name_until_it_is_deleted(client, embedded, folder) -> None:
    content = {"content-type": "application/octet-stream"}
    made = client.post(
        "/v1/steering/probes?name=joy", content=(folder / "joy.safetensors").read_bytes(), headers=content
    )
    assert made.status_code == 201
    assert made.json()["site"] == "post_block:0"
    listed = client.get("/v1/steering/probes").json()["probes"]
    assert [(one["name"], one["loaded_at_start"]) for one in listed] == [("anger", True), ("joy", False)]
    assert listed[1]["digest"] == JOY.digest.hex()
    answer, want = ask(client, gated("joy")).json(), expected(embedded, gated("joy"))
    assert answer["choices"][0]["text"].split() == want.text.split()
    check_receipt(answer, want)
    again = client.post("/v1/steering/probes", json={"name": "joy", "probe": inline(JOY)})
    assert (again.status_code, again.json()["replaced"]) == (200, JOY.digest.hex())
    assert client.delete("/v1/steering/probes/joy").status_code == 200
    gone = ask(client, gated("joy"))
    assert gone.status_code == 400
    assert "gate.probe: there is no probe 'joy'; registered are anger" in gone.text
    assert client.delete("/v1/steering/probes/joy").status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"name": "x", "probe": inline(LATE)}, "no probe can be read at post_block:3 here"),
        ({"name": "x", "probe": {"post_block": {"0": [1.0]}}}, "has width 1"),
        ({"name": "x", "probe": {"post_block": {"0": [1.0, "a"]}}}, "probe.post_block.0[1]"),
        ({"name": "x", "probe": "anger"}, "want a direction at one site"),
        ({"name": "a b", "probe": inline(JOY)}, "a name has 1 to 128"),
    ],
)
def test_a_probe_that_no_gate_could_use_is_refused(client, body, message) -> None:
    answer = client.post("/v1/steering/probes", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_gate_that_is_not_served_is_a_400_with_its_place(client) -> None:
    answer = ask(client, gated(inline(LATE)))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering.interventions[0].gate.probe"
    streamed = ask(client, gated(inline(LATE)), stream=True)
    assert streamed.status_code == 400


CLAMP = {"kind": "clamp", "vector": "calm", "value": 4.0}
TO = {"post_block": {str(layer): np.random.default_rng(layer).normal(size=WIDTH).round(4).tolist() for layer in (1, 2)}}
ANGRY = {"probe": "anger", "threshold": 0.5}
SOMEWHAT = {"all": [ANGRY, {"probe": "anger", "threshold": 4.0, "invert": True}]}


@pytest.mark.parametrize(
    "steps",
    [
        [CLAMP],
        [{"kind": "swap", "vector": "calm", "to": TO}],
        [{**CLAMP, "gate": ANGRY, "phase": "decode"}],
        [{**CLAMP, "gate": SOMEWHAT}],
    ],
    ids=["clamp", "swap", "gated clamp", "clamp between two gates"],
)
def test_a_slot_over_http_answers_as_the_embedded_engine_and_its_receipt_names_its_vectors(
    client, embedded, steps: list[dict[str, Any]]
) -> None:
    spec = {"interventions": steps}
    answer, want = ask(client, spec).json(), expected(embedded, spec)
    assert answer["choices"][0]["text"].split() == want.text.split()
    assert want.text != expected(embedded, None).text
    receipt, told = want.receipt.as_json(), dict(answer["steering"])
    mine, theirs = (
        [(use["probe"], use["gate"], use["within"], use["tokens"], use["above_half"]) for use in one.pop("gates", [])]
        for one in (receipt, told)
    )
    assert mine == theirs
    assert len(mine) == (3 if steps[0].get("gate") == SOMEWHAT else int("gate" in steps[0]))
    (due,), (found,) = (one.pop("interventions") for one in (receipt, told))
    assert found == {**due, **{key: pytest.approx(due[key], rel=1e-3) for key in ("mean_correction", "touched")}}
    assert told == receipt
    assert found["tokens"] == (COUNT - 1 if steps[0].get("phase") == "decode" else len(PROMPT) + COUNT - 1)
    assert found["measured"] == 2 * found["tokens"]
    names = [vector["name"] for vector in told["vectors"]]
    assert names == (["calm", None] if "to" in steps[0] else ["calm"])


def test_choices_of_an_answer_are_measured_together_in_a_stream_too(client, embedded) -> None:
    spec = {"interventions": [CLAMP, {"kind": "add", "vector": "calm", "scale": 0.5, "phase": "prefill"}]}
    (due, _) = expected(embedded, spec).receipt.as_json()["interventions"]
    both = {"n": 2, "temperature": 1, "top_k": 1}
    text = ask(client, spec, stream=True, **both).text
    *_, last = (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))
    for told in (ask(client, spec, **both).json()["steering"], last["steering"]):
        clamp, add = told["interventions"]
        assert (clamp["tokens"], add["tokens"]) == (2 * due["tokens"], 2 * len(PROMPT))
        assert clamp["measured"] == 2 * due["measured"]
        assert clamp["mean_correction"] == pytest.approx(due["mean_correction"], rel=1e-3)
        assert "measured" not in add
    pages = client.get("/metrics").text.splitlines()
    counted = {
        line.split()[0]: float(line.split()[1])
        for line in pages
        if line.startswith("trimtab_intervention_tokens_total")
    }
    assert counted['trimtab_intervention_tokens_total{kind="clamp"}'] >= 4 * due["tokens"]


@pytest.mark.parametrize(
    ("steps", "field", "flag"),
    [
        ([{"kind": "ablate", "vector": "calm"}], "interventions[0].kind", "--steering-kinds"),
        ([{**CLAMP, "vector": inline_at(3)}], "interventions[0].vector", "--steering-slot-layers"),
        ([CLAMP, {**CLAMP, "vector": TO}], "interventions", "--steering-slots"),
    ],
    ids=["kind", "site", "count"],
)
def test_what_was_not_declared_at_start_is_a_400_that_names_the_flag(client, steps, field: str, flag: str) -> None:
    answer = ask(client, {"interventions": steps})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(f"steering.{field}")
    assert flag in answer.json()["error"]["message"]


def test_the_status_page_and_the_start_log_tell_of_slots(client, folder) -> None:
    sites = ["post_block:1", "post_block:2"]
    assert client.get("/v1/steering").json()["slots"] == {"per_site": 1, "kinds": ["clamp", "swap"], "sites": sites}
    assert f"slots: 1 at each of 2 sites, for clamp, swap: {', '.join(sites)}" in (folder / "server.log").read_text()


def test_the_status_page_and_the_metrics_tell_of_gates(client) -> None:
    page = client.get("/v1/steering").json()
    assert page["gates"] == {"per_phase": 2, "probe_sites": ["post_block:0", "post_block:1"]}
    assert len(page["sites"]) == LAYERS
    before = told(client)
    assert ask(client, gated("anger")).status_code == 200
    after = told(client)
    assert after - before == len(PROMPT) + COUNT - 1  # the prompt is shorter than a block, so none of it is cached


def told(client: httpx.Client) -> float:
    time.sleep(1.1)  # the page reuses what workers said for a second
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("trimtab_gate_tokens_total{"))
