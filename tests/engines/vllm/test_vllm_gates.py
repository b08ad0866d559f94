"""Gates in stock vLLM: the embedded engine's answers, whoever else is in the batch; refusals; what was counted."""

from typing import Any

import pytest
from vllm_harness import outcomes_of, run_scenario

pytestmark = pytest.mark.vllm

# Inductor compiles gates in the scenario of the monitor, beside it.
outcome = outcomes_of("gates", {"V1 eager": 32, "V1 traced": 24, "V2 eager": 8, "V2 traced": 8})


def test_a_mixed_batch_answers_as_the_embedded_engine_does(outcome: dict[str, Any]) -> None:
    assert outcome["differs from ungated"] >= outcome["requests"] // 2  # the gates bite
    assert outcome["differs from unsteered"] >= outcome["requests"] // 2
    assert outcome["mixed"] == []
    assert outcome["unsteered"] == []


def test_a_request_alone_answers_as_it_does_in_a_batch(outcome: dict[str, Any]) -> None:
    assert outcome["alone"] == []


def test_prompts_found_in_the_prefix_cache_change_no_answer(outcome: dict[str, Any]) -> None:
    assert outcome["again"] == []


def test_every_token_behind_a_gate_is_counted_once(outcome: dict[str, Any]) -> None:
    assert outcome["totals"] == outcome["tokens"]


def test_offline_outputs_carry_receipts_that_count_as_the_embedded_engine_does(outcome: dict[str, Any]) -> None:
    assert outcome["receipts"] == []


def test_rows_are_given_back(outcome: dict[str, Any]) -> None:
    (status,) = outcome["status"]
    assert status["runner"] == outcome["case"][:2].lower()
    assert status["rows_in_use"] == 0


def test_what_the_engine_does_not_serve_is_refused_by_name(outcome: dict[str, Any]) -> None:
    told = outcome["refusals"]
    assert "interventions[0].gate.probe: no probe can be read at post_block:2 here" in told["probe site"]
    assert "interventions: has 5 different gates on one token; this engine serves 4" in told["too many"]
    assert "interventions[0].gate.probe: there is no probe 'joy'; no probe is registered" in told["unknown probe"]


def test_with_the_row_monitor_the_same_requests_get_the_same_answers(outcome: dict[str, Any]) -> None:
    found = outcome["lowered"]
    assert found["differs from ungated"] >= outcome["requests"] // 4
    assert found["on"] == found["off"] == found["again"] == []
    assert found["identities"] == []
    lowered, *due = found["gates"]
    assert lowered == sum(due) > outcome["requests"] // 4
    (status,) = found["status"]
    assert status["rows_in_use"] == status["late_variants"] == 0


def test_gates_work_in_prompts_that_come_in_chunks_and_after_preemption(outcome: dict[str, Any]) -> None:
    assert ("chunked" in outcome) == outcome["case"].endswith("eager")
    if "chunked" in outcome:
        assert outcome["chunked"] == []
        assert outcome["preemptions"] > 0
        assert outcome["preempted"] == []


@pytest.mark.parametrize("kind", ["tp", "pp"])
def test_ranks_together_answer_as_the_embedded_engine_does(kind: str) -> None:
    outcome = run_scenario("gates", kind, "12")
    assert outcome["differs from unsteered"] >= 8
    assert outcome["mixed"] == []
    first, second = outcome["status"]
    assert first["digest"] == second["digest"]
    lowered = [sum(use["lowered"] for use in status["gates"]) for status in (first, second)]
    assert lowered == ([outcome["lowered"]] * 2 if kind == "tp" else [0, outcome["lowered"]])
    assert outcome["lowered"]
    counted = [sum(use["tokens"] for use in status["gates"]) for status in (first, second)]
    if kind == "tp":
        assert counted == [outcome["tokens"]] * 2
        assert outcome["across stages"] == ""
    else:  # each stage evaluates its own
        assert all(counted)
        assert sum(counted) == outcome["tokens"]
        assert "gate.probe: is read at post_block:0" in outcome["across stages"]
        assert "ends before layer 2" in outcome["across stages"]
