"""Many requests, and several ranks: nothing leaks, and every rank keeps the same state."""

from typing import Any

import pytest
from vllm_harness import run_scenario

pytestmark = pytest.mark.vllm

SITES = 24  # six hook points in four layers


@pytest.fixture(scope="module", params=["tp", "pp"])
def parallel(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param, run_scenario("parallel", request.param, "39")


def test_ranks_together_answer_as_the_embedded_engine_does(parallel: tuple[str, dict[str, Any]]) -> None:
    _, outcome = parallel
    assert outcome["mixed"] == []
    assert outcome["again"] == []


def test_every_rank_knows_the_tokens_that_decide(parallel: tuple[str, dict[str, Any]]) -> None:
    _, outcome = parallel
    assert outcome["where"] == []


def test_corrections_of_tensor_ranks_count_once_and_those_of_stages_add_up(
    parallel: tuple[str, dict[str, Any]],
) -> None:
    _, outcome = parallel
    assert outcome["corrections"] == []


def test_ranks_that_saw_the_same_requests_hold_the_same_state(parallel: tuple[str, dict[str, Any]]) -> None:
    _, outcome = parallel
    first, second = outcome["status"]
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["digest"] == second["digest"]
    assert first["row_uploads"] == second["row_uploads"] > 0
    assert first["capacity"] == second["capacity"] == 12  # 39 requests with 20 different specs had to wait for them
    assert first["rows_in_use"] == second["rows_in_use"] == 0


def test_tensor_ranks_steer_all_layers_and_pipeline_stages_their_own(parallel: tuple[str, dict[str, Any]]) -> None:
    kind, outcome = parallel
    first, second = (set(status["sites"]) for status in outcome["status"])
    assert len(first | second) == SITES
    assert first == second if kind == "tp" else not first & second


def test_two_thousand_requests_with_two_hundred_vectors_leave_nothing_behind() -> None:
    outcome = run_scenario("churn")
    assert outcome["differences"] == []
    (status,) = outcome["status"]
    assert status["rows_in_use"] == 0
    assert status["capacity"] < 200  # so that rows had to be given to others all along
    assert status["row_uploads"] >= 200
