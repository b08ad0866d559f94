"""A steered engine starts only if it steers; what it cannot do is said at start, and a bad request ends alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm_harness import run_scenario

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    return run_scenario("start")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("hook point of another family", "CohereDecoderLayer have no post_attn; they have pre_attn, post_block"),
        ("layer that does not exist", "the model has layers 0 to 3"),
        ("setting that does not exist", "steering.layer"),
        ("memory that is no memory", "steering.table_memory: Value error, give a share of the device's memory"),
        ("scheduler of another kind", "OwnScheduler decides in its own way which requests run"),
        ("missing vector file", "steering.vectors.calm"),
        ("unsupported mode", "set cpu_offload_gb"),
        ("model that is not steered", "the models of workers [0] were loaded without being steered"),
        ("prefix cache that passes ours by", "blocks of a steered prompt the keys of an unsteered one"),
        ("site without effect", "steering has no effect at post_block:2:"),
        ("layer that scales its stream", "LlamaDecoderLayer cannot be steered: layer 2 hands on 0.5 times the stream"),
        ("monitor without effect", "an open gate has no effect at post_block:2, post_block:3:"),
        ("gates without effect", "an open gate has no effect at post_block:1, post_block:2, post_block:3:"),
        ("slots without effect", "steering.slots: a slot has no effect at post_block:1, post_block:2: this engine"),
        (
            "slots that read nothing",
            "a slot does not bring the stream to where it was asked at post_block:1, post_block:2",
        ),
        ("gates that never shut", "a shut gate has no effect at post_block:1, post_block:2, post_block:3:"),
    ],
)
def test_an_engine_that_would_not_steer_does_not_start(outcome: dict[str, Any], case: str, said: str) -> None:
    assert outcome["refused"][case].startswith("SteeringError")
    assert said in outcome["refused"][case]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no mark", "a front end that never loaded trimtab"),
        ("no mark, and a spec", "a front end that never loaded trimtab"),
        ("a spec as users write it", "wire"),
        ("nonsense", "wire"),
        ("a broken wire form", "programs[0][0][0]"),
        ("a wire form for a site that is not served", "mlp_in:0 is not served"),
    ],
)
def test_the_engine_core_refuses_what_came_around_the_front_end(outcome: dict[str, Any], case: str, said: str) -> None:
    answer = outcome["doors"]["refused"][case]
    assert answer.startswith("RefusedError")  # ours and vLLM's own in one
    assert said in answer


def test_the_engine_core_takes_what_a_front_end_admitted_and_survives_the_rest(outcome: dict[str, Any]) -> None:
    assert outcome["doors"]["refused"]["a wire form"] == "started"
    assert outcome["doors"]["refused"]["a request that ends at once"] == "started"
    assert {"version", "vectors", "programs"} <= set(outcome["doors"]["carried keys"])
    assert outcome["doors"]["still answers"] == 8


def test_sites_before_the_first_probe_have_no_gates_and_only_probe_sites_decide(outcome: dict[str, Any]) -> None:
    assert outcome["gates"] == {
        "post_block:0": [0, False],
        "post_block:1": [2, True],
        "post_block:2": [2, False],
        "post_block:3": [2, False],
    }


def test_an_engine_without_steering_is_left_as_it_is(outcome: dict[str, Any]) -> None:
    assert outcome["unconfigured"] == {
        "layer": "vllm.model_executor.models.llama",
        "buffers": [],
        "wrapped": [],
        "answers": 8,
    }


def test_engines_of_different_settings_share_a_compile_cache_and_each_is_right(tmp_path: Path) -> None:
    slots = json.dumps({"slots": 1, "kinds": ["ablate", "clamp"]})  # in Inductor's graph
    runs = ("stock", "{}", slots, "stock")
    outcomes = [run_scenario("compile_cache", settings, cache=tmp_path) for settings in runs]
    assert [outcome["differences"] for outcome in outcomes] == [[]] * 4
    assert [outcome["attached"] for outcome in outcomes] == [False, True, True, False]
    assert [outcome["steered differently"] for outcome in outcomes] == [0, 3, 3, 0]
    # One artifact per configuration: the last run found that of the first.
    artifacts = list((tmp_path / "torch_compile_cache" / "torch_aot_compile").iterdir())
    assert len(artifacts) == 3
    # Without settings in the key, the steered engine finds the stock artifact. The canary does not let it start.
    stale = run_scenario("compile_cache", "stale", cache=tmp_path)["refused"]
    assert stale.startswith("SteeringError")
    assert "no effect at post_block:0:" in stale
