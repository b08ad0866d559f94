"""A front end that another process configured: it has the doors, or the engine core refuses what comes from it."""

import pytest
from vllm_harness import run_scenario

pytestmark = pytest.mark.vllm


def test_a_configuration_that_arrives_from_another_process_brings_the_doors_along() -> None:
    outcome = run_scenario("foreign_front_end", "travelling")
    assert outcome["differences"] == []
    assert outcome["answers"][1] != outcome["plain"][0]
    assert "steering.interventions" in outcome["answers"][2]


def test_an_engine_core_refuses_requests_of_a_front_end_without_doors_and_says_why() -> None:
    outcome = run_scenario("foreign_front_end", "plain")
    assert all(isinstance(answer, str) for answer in outcome["answers"]), outcome["answers"]  # none has tokens
    told = outcome["log"] + "".join(outcome["answers"])
    assert told.count("a request came from a front end that never loaded trimtab") >= 3
