"""Every convention of vLLM's decoder layers is steered where the embedded engine steers it, at every hook point."""

from typing import Any

import pytest
from vllm_harness import run_scenario

pytestmark = pytest.mark.vllm

LAYERS = {  # family: the layer class that shows the convention
    "llama": "LlamaDecoderLayer",  # split
    "qwen3": "Qwen3DecoderLayer",  # split
    "gemma2": "Gemma2DecoderLayer",  # split, norms on both sides of a branch
    "cohere": "CohereDecoderLayer",  # first of a pair, parallel branches
    "opt": "OPTDecoderLayer",  # whole
    "falcon": "FalconDecoderLayer",  # whole, parallel branches
    "qwen3_moe": "Qwen3MoeDecoderLayer",  # split, experts
    "mixtral": "MixtralDecoderLayer",  # split, experts
    "transformers": "LlamaDecoderLayer",  # [1, n, H], through vLLM's Transformers backend
}
MODES = {  # "traced" is compiled by Dynamo and split like Inductor's graphs, without a compiler; a family of each kind
    "eager": tuple(LAYERS),
    "traced": tuple(family for family in LAYERS if family not in ("qwen3", "mixtral")),
}
CASES = [(mode, family) for mode, families in MODES.items() for family in families]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_scenario("families", request.param, ",".join(MODES[request.param]))


@pytest.mark.parametrize(("outcomes", "family"), CASES, indirect=["outcomes"], scope="module")
def test_a_family_answers_as_the_embedded_engine_does(outcomes: dict[str, Any], family: str) -> None:
    outcome = outcomes[family]
    assert outcome["layer"] == LAYERS[family]
    assert outcome["steered differently"] >= outcome["specs"] // 2
    assert outcome["differences"] == []


@pytest.mark.parametrize(("outcomes", "family"), CASES, indirect=["outcomes"], scope="module")
def test_how_much_of_an_addition_arrives_is_measured_at_every_hook_point(outcomes: dict[str, Any], family: str) -> None:
    assert outcomes[family]["unmeasured"] == []
