"""What steered requests share in vLLM's prefix cache: as much as is right, and never more."""

from typing import Any

import pytest
from vllm_harness import run_scenario

pytestmark = pytest.mark.vllm

PROMPT, TURN = 96, 160  # tokens in full blocks: of a prompt of 100, and of that prompt with an answer of 70


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    return run_scenario("prefix_cache")


@pytest.fixture
def cached(outcome: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = outcome["cached"]
    return found


def test_sharing_changes_no_answer(outcome: dict[str, Any]) -> None:
    assert outcome["requests"] >= 25
    assert outcome["differences"] == []


def test_equal_specs_share_their_prompt(cached: dict[str, int]) -> None:
    assert cached["equal specs"] == PROMPT


@pytest.mark.parametrize(
    "case", ["same content, scaled", "another prefill spec", "unsteered after steered", "steered after unsteered"]
)
def test_different_prefill_steering_shares_nothing(cached: dict[str, int], case: str) -> None:
    assert cached[case] == 0


@pytest.mark.parametrize(
    "case", ["decode-only after unsteered", "unsteered after decode-only", "another decode-only spec"]
)
def test_decode_only_steering_shares_the_prompt_with_everyone(cached: dict[str, int], case: str) -> None:
    assert cached[case] == PROMPT


@pytest.mark.parametrize("steering", ["decode-only", "prefill-only"])
def test_a_turn_that_sends_a_steered_answer_again_reuses_the_prompt_alone(
    cached: dict[str, int], steering: str
) -> None:
    assert cached[f"a turn after an answer with {steering} steering"] == PROMPT


def test_a_turn_reuses_the_answer_where_both_phases_are_steered_alike(cached: dict[str, int]) -> None:
    assert cached["a turn after an answer with both phases steering"] == TURN
    assert cached["a turn after an answer with no steering"] == TURN


def test_a_steered_answer_is_not_reused_by_unsteered_requests(cached: dict[str, int]) -> None:
    assert cached["its answer sent unsteered, both phases"] == 0
    assert cached["its answer sent unsteered, prefill-only"] == 0


def test_a_first_block_that_a_steered_answer_fills_is_found_by_that_steering_alone(cached: dict[str, int]) -> None:
    assert cached["a short chat's turn, sent unsteered"] == 0
    assert cached["a short chat's turn"] == 32


@pytest.mark.parametrize("steering", ["decode-only", "prefill-only"])
def test_the_same_tokens_with_another_prompt_length_share_the_common_prompt_alone(
    cached: dict[str, int], steering: str
) -> None:
    assert cached[f"another prompt length, {steering}"] == PROMPT


def test_the_keys_of_unsteered_requests_are_those_of_stock_vllm(outcome: dict[str, Any]) -> None:
    assert len(outcome["stock keys"]["stock"]) == 6
    assert outcome["stock keys"]["ours"] == outcome["stock keys"]["stock"]
