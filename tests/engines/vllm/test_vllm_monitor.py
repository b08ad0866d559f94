"""A monitor in stock vLLM: the embedded engine's answers behind the same one, on both runners.

Inductor compiles it on V2. Its emission is a matter of the model, which both runners run.
"""

from typing import Any

import pytest
from vllm_harness import outcomes_of, run_scenario

pytestmark = pytest.mark.vllm

outcome = outcomes_of("monitor", {"V1 eager": 40, "V1 traced": 30, "V2 eager": 10, "V2 compiled": 10})


def test_a_mixed_batch_answers_as_the_embedded_engine_does(outcome: dict[str, Any]) -> None:
    assert outcome["differs from unmonitored"] >= outcome["requests"] // 4  # the monitor bites
    assert outcome["mixed"] == []
    assert outcome["alone"] == []
    assert outcome["unsteered"] == []


def test_prompts_found_in_the_prefix_cache_change_no_answer(outcome: dict[str, Any]) -> None:
    assert outcome["again"] == []


def test_an_answer_sent_again_as_a_prompt_has_its_full_strength(outcome: dict[str, Any]) -> None:
    assert outcome["next turn"] == []


def test_requests_that_say_where_stand_behind_it_too(outcome: dict[str, Any]) -> None:
    assert outcome["where"] == []


def test_the_worker_says_that_it_is_on(outcome: dict[str, Any]) -> None:
    (status,) = outcome["status"]
    assert status["runner"] == outcome["case"][:2].lower()
    assert status["probe_sites"] == ["pre_attn:0", "mlp_out:0", "post_block:0", "post_block:1"]
    assert [use["probe"] for use in status["gates"]] == ["(inline)", "(monitor)"]
    assert status["rows_in_use"] == status["late_variants"] == 0


def test_its_graph_is_that_of_gates_with_one_more_and_one_without_a_monitor_has_none(outcome: dict[str, Any]) -> None:
    for site, role in outcome["roles"].items():
        assert role == [5, site in ("pre_attn:0", "mlp_out:0", "post_block:0", "post_block:1")], site
    for site, role in outcome.get("alone roles", {}).items():
        assert role == [int(site.endswith((":2", ":3"))), site == "pre_attn:2"], site
    assert all(role == [0, False] for role in outcome.get("plain roles", {}).values())


def test_chunked_prompts_preemption_and_other_sites_change_nothing(outcome: dict[str, Any]) -> None:
    assert ("chunked" in outcome) == outcome["case"].endswith("eager")
    if "chunked" in outcome:
        assert outcome["chunked"] == []
        assert outcome["preemptions"] > 0
        assert outcome["preempted"] == []
        assert outcome["pre_attn"] == []
        assert outcome["mlp_out"] == []


@pytest.mark.parametrize("kind", ["tp", "pp"])
def test_ranks_together_answer_as_the_embedded_engine_does(kind: str) -> None:
    outcome = run_scenario("monitor", kind, "12")
    assert outcome["differs from unmonitored"] >= 3
    assert outcome["mixed"] == []
    first, second = outcome["status"]
    assert first["digest"] == second["digest"]
    if kind == "tp":
        assert first["probe_sites"] == second["probe_sites"] == ["post_block:1"]
    else:
        assert (first["probe_sites"], second["probe_sites"]) == ([], ["post_block:2"])
        told = outcome["across stages"]
        assert "steering.monitor.probe: is read at post_block:1, and post_block:2 is steered" in told
        assert "ends before layer 2" in told
