"""Stock vLLM, steered, gives the embedded engine's greedy tokens, on both runners.

Plain rows and slots are compiled by Inductor in the test of compile caches, and beside a monitor in its scenario.
"""

from importlib.metadata import version
from typing import Any

import pytest
from vllm_harness import outcomes_of

pytestmark = pytest.mark.vllm

outcome = outcomes_of("parity", {"V1 eager": 48, "V2 eager": 32})


def test_a_mixed_batch_answers_as_the_embedded_engine_does(outcome: dict[str, Any]) -> None:
    assert outcome["steered differently"] >= 24  # the specs bite: agreeing with an unsteered engine would not pass
    assert outcome["mixed"] == []


def test_unsteered_requests_answer_as_the_plain_model_does(outcome: dict[str, Any]) -> None:
    assert outcome["unsteered"] == []


def test_prompts_found_in_the_prefix_cache_change_no_answer(outcome: dict[str, Any]) -> None:
    assert outcome["again"] == []


def test_rows_are_given_back_when_their_requests_end(outcome: dict[str, Any]) -> None:
    for status in outcome["status"]:
        assert status["runner"] == outcome["case"][:2].lower()
        assert status["rows_in_use"] == 0
        assert status["row_uploads"] >= 7
        assert status["late_variants"] == 0


def test_how_much_of_an_addition_arrives_is_measured_at_start(outcome: dict[str, Any]) -> None:
    assert outcome["unmeasured"] == []


def test_steering_survives_a_reload_of_the_weights(outcome: dict[str, Any]) -> None:
    assert outcome["reloaded"] == []


def test_every_kind_in_one_batch_answers_as_the_embedded_engine_does_chunk_by_chunk(outcome: dict[str, Any]) -> None:
    assert outcome["slots differ"] >= outcome["requests"] // 2
    assert outcome["slots"] == []
    assert outcome["slots again"] == []
    assert outcome["slots alone"] == []
    (status,) = outcome["slots status"]
    assert len(status["slot_sites"]) == len(status["sites"]) == 24
    assert status["rows_in_use"] == status["late_variants"] == 0


def test_receipts_tell_of_slots_as_the_embedded_engines_do(outcome: dict[str, Any]) -> None:
    assert outcome["slots receipts"] == []


def test_corrections_are_counted_as_the_embedded_engine_counts_them_chunk_by_chunk(outcome: dict[str, Any]) -> None:
    assert outcome["corrections"] == []


def test_more_slots_than_there_are_is_refused_with_the_flag_named(outcome: dict[str, Any]) -> None:
    assert "4 slots" in outcome["slots refused"]
    assert "--steering-slots" in outcome["slots refused"]


def test_preempted_requests_come_back_to_the_same_answer_with_the_prefix_cache_on(outcome: dict[str, Any]) -> None:
    assert outcome["preemptions"] > 0
    assert outcome["preempted"] == []
    assert outcome["after preemption"][0]["rows_in_use"] == 0


def test_requests_that_say_where_answer_as_the_embedded_engine_does_chunk_by_chunk(outcome: dict[str, Any]) -> None:
    assert outcome["where differ"] >= outcome["requests"] // 4
    assert outcome["where"] == []
    assert outcome["where again"] == []


def test_answers_sent_again_are_placed_as_the_prompt_that_they_are_now(outcome: dict[str, Any]) -> None:
    assert outcome["where turns"] == []


def test_what_tokens_decide_outlasts_preemption_with_the_prefix_cache_on(outcome: dict[str, Any]) -> None:
    assert outcome["where preemptions"] > 0
    assert outcome["where preempted"] == []


def test_what_tokens_decide_goes_on_where_an_answer_is_found_in_the_prefix_cache(outcome: dict[str, Any]) -> None:
    assert sum(hit > 26 for hit in outcome["hits"]) >= 7  # prompts are no longer
    assert outcome["where thrown out"] == []


def test_guesses_at_tokens_change_nothing_that_tokens_decide(outcome: dict[str, Any]) -> None:
    if version("vllm") < "0.32":  # V2 has no such speculator
        assert "drafts" not in outcome
        return
    assert 0 < outcome["accepted drafts"] < outcome["drafts"]
    assert outcome["where guessed"] == []
    assert outcome["after guesses"][0]["rows_in_use"] == 0
