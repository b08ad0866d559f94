"""How the reports of several engines and ranks become one number each."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from trimtab.serving.metrics import Metrics


def status(rows: int, uploads: int, late: int, *gates: dict[str, Any]) -> dict[str, Any]:
    return {
        "rows_in_use": rows, "capacity": 32, "row_uploads": uploads, "warmed_launches": 100, "late_variants": late,
        "gates": list(gates),
    }  # fmt: skip


def gate(probe: str, tokens: int, above_half: int, mean: float, lowered: int = 0) -> dict[str, Any]:
    return {"probe": probe, "tokens": tokens, "above_half": above_half, "mean": mean, "lowered": lowered}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry)


def test_ranks_of_an_engine_count_once_and_engines_add_up(metrics: Metrics, registry: CollectorRegistry) -> None:
    first = [status(3, 7, 1), status(3, 7, 0)]
    second = [status(2, 5, 0), status(2, 6, 2)]  # one rank is a step behind
    metrics.workers([first, second])
    assert registry.get_sample_value("trimtab_rows_in_use") == 5
    assert registry.get_sample_value("trimtab_row_capacity") == 64
    assert registry.get_sample_value("trimtab_row_uploads_total") == 13
    assert registry.get_sample_value("trimtab_warmed_kernel_launches_total") == 400
    assert registry.get_sample_value("trimtab_late_kernel_variants_total") == 3


def test_gated_tokens_add_up_over_engines_and_means_weigh_by_them(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    behind, ahead = gate("anger", 10, 1, 0.1), gate("anger", 30, 9, 0.3)
    metrics.workers([[status(0, 0, 0, behind), status(0, 0, 0, ahead)], [status(0, 0, 0, gate("anger", 10, 8, 0.7))]])
    told = {
        key: registry.get_sample_value(f"trimtab_gate_{key}", {"probe": "anger"})
        for key in ("tokens_total", "open_tokens_total", "mean")
    }
    assert told == {"tokens_total": 40, "open_tokens_total": 17, "mean": pytest.approx(0.4)}


def test_gates_that_are_run_as_probes_of_rows_are_counted_as_such(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    behind, ahead = gate("anger", 0, 0, 0.0, lowered=2), gate("anger", 0, 0, 0.0, lowered=3)
    metrics.workers([[status(0, 0, 0, ahead), status(0, 0, 0, behind)], [status(0, 0, 0, ahead)]])
    assert registry.get_sample_value("trimtab_gate_lowered_total", {"probe": "anger"}) == 6


def test_tokens_of_interventions_are_counted_by_kind(metrics: Metrics, registry: CollectorRegistry) -> None:
    for kind, tokens in (("add", 3), ("clamp", 4), ("add", 5), ("clamp", 0)):
        metrics.acted(kind, tokens)
    told = {
        kind: registry.get_sample_value("trimtab_intervention_tokens_total", {"kind": kind})
        for kind in ("add", "clamp")
    }
    assert told == {"add": 8, "clamp": 4}


def test_without_an_answer_the_last_values_stay(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.workers([[status(3, 7, 1, gate("calm", 0, 0, 0.0))]])
    metrics.workers([])
    metrics.workers([[]])
    assert registry.get_sample_value("trimtab_rows_in_use") == 3
    assert registry.get_sample_value("trimtab_gate_tokens_total", {"probe": "calm"}) == 0


def test_labels_are_bounded_and_what_has_none_of_its_own_is_still_counted(
    metrics: Metrics, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serving.metrics.MOST_LABELS", 2)
    names = ["a", "b", "c", "d"]
    for _ in range(2):
        metrics.workers([[status(0, 0, 0, *(gate(name, 10, 1, 0.5) for name in names))]])
    told = {n: registry.get_sample_value("trimtab_gate_tokens_total", {"probe": n}) for n in [*names, "(others)"]}
    assert told == {"a": 10, "b": 10, "c": None, "d": None, "(others)": 20}
