"""Rows as a pool, in stock vLLM: requests wait for rows in order, unsteered ones do not, and all are answered."""

from typing import Any

import pytest
from vllm_harness import outcomes_of

pytestmark = pytest.mark.vllm

# Two hundred on V1; V2's kernels are interpreted.
outcome = outcomes_of("rows", {"V1 eager": 200, "V2 eager": 60})


def test_many_requests_on_few_rows_are_answered_as_if_there_was_room(outcome: dict[str, Any]) -> None:
    assert outcome["differences"] == []
    (status,) = outcome["status"]
    assert status["capacity"] == 8
    assert status["rows_in_use"] == 0


def test_steered_requests_start_in_the_order_in_which_they_came(outcome: dict[str, Any]) -> None:
    steered = [number for starts, _, _ in outcome["steps"] for number in starts if number % 4]
    assert steered == [number for number in range(outcome["requests"]) if number % 4]
    waiting = [waits for _, _, waits in outcome["steps"]]
    assert max(waiting) > outcome["requests"] // 2  # so that most did wait
    assert waiting[-1] == 0
    assert max(reserved for _, reserved, _ in outcome["steps"]) <= 8


def test_each_request_is_asked_when_it_comes_and_then_no_more_than_one_that_has_to_wait_in_each_step(
    outcome: dict[str, Any],
) -> None:
    assert outcome["requests"] <= outcome["asked"] <= 2 * outcome["requests"] + len(outcome["steps"])


def test_unsteered_requests_pass_those_that_wait_for_rows(outcome: dict[str, Any]) -> None:
    starts, _, waiting = outcome["steps"][0]
    assert waiting
    assert {number for number in range(outcome["requests"]) if number % 4 == 0} <= set(starts)


def test_a_request_for_more_rows_than_there_are_is_refused_and_the_engine_goes_on(outcome: dict[str, Any]) -> None:
    field, message = outcome["refused"]
    assert field == "steering"
    assert "needs 9 table rows at one time, and this engine has 8" in message
    assert "`table_memory`" in message
    assert outcome["goes on"] == []


def test_requests_that_wait_for_rows_can_be_aborted_and_make_room_when_they_hold_them(outcome: dict[str, Any]) -> None:
    # [rows reserved, requests that wait for some, requests of which the scheduler knows]
    assert outcome["aborts"]["told"] == [[8, 2, 3], [8, 1, 2], [0, 0, 0]]
    assert outcome["aborts"]["finished"] == [["waits too", 2]]


def test_preempted_requests_keep_their_rows_and_priorities_decide_who_waits(outcome: dict[str, Any]) -> None:
    assert outcome["preemptions"] > 0
    times, always = outcome["kept"]
    assert times > 0
    assert always
    assert outcome["most reserved"] == 6
    assert outcome["tight"] == []
    assert outcome["started"] == outcome["due"]
    assert outcome["left"] == [0, 0]
