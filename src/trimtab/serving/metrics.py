"""Prometheus metrics of the front end, on the `/metrics` page that vLLM serves already.

Requests are counted where they are admitted, in the API server. What only workers know (rows, uploads, late kernel
variants) is asked of them when the page is read, and shown as gauges: with several API servers each sees the same
workers, so the latest value counts and a sum would be wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from trimtab.program.counting import MOST_LABELS, OTHERS

WORKER_GAUGES = {
    "trimtab_rows_in_use": ("rows_in_use", "Steering table rows that running requests hold."),
    "trimtab_row_capacity": ("capacity", "Steering table rows that requests can hold."),
    "trimtab_rows_reserved": (
        "rows_reserved",
        "Steering table rows that requests have reserved: those that run, were preempted, or are about to run.",
    ),
    "trimtab_requests_waiting_for_rows": (
        "requests_waiting",
        "Requests that wait, among those that vLLM counts as waiting, for steering table rows.",
    ),
    "trimtab_row_uploads_total": ("row_uploads", "Rows written to the steering tables since start."),
    "trimtab_warmed_kernel_launches_total": (
        "warmed_launches",
        "Launches that compiled and tried kernels before service, all workers: 0 where none was warmed.",
    ),
    "trimtab_late_kernel_variants_total": (
        "late_variants",
        "Kernel variants compiled after warm-up, all workers.",
    ),
}

OF_EACH_RANK = ("warmed_launches", "late_variants")  # each compiles for itself

GATE_GAUGES = {
    "trimtab_gate_tokens_total": ("tokens", "Tokens on which gates of a probe were evaluated since start."),
    "trimtab_gate_open_tokens_total": ("above_half", "Of these, tokens whose factor exceeded one half."),
    "trimtab_gate_mean": ("mean", "Mean factor over these tokens."),
    "trimtab_gate_lowered_total": (
        "lowered",
        "Times that a request had such a gate as the probe of a table row, where its new tokens are not counted.",
    ),
}


class Metrics:
    """The metrics, registered once per Prometheus registry; an `Observer` for the front end."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._steered = Counter("trimtab_requests_steered", "Requests admitted with steering.", registry=registry)
        self._refused = Counter(
            "trimtab_requests_refused", "Requests refused for their steering, by reason.", ["reason"], registry=registry
        )
        self._acted = Counter(
            "trimtab_intervention_tokens",
            "Tokens on which interventions acted, by kind: positions of finished requests.",
            ["kind"],
            registry=registry,
        )
        self._vectors = Gauge(
            "trimtab_vectors", "Registered vectors.", registry=registry, multiprocess_mode="mostrecent"
        )
        self._gauges = {
            key: Gauge(name, text, registry=registry, multiprocess_mode="mostrecent")
            for name, (key, text) in WORKER_GAUGES.items()
        }
        self._silent = Gauge(
            "trimtab_engines_silent",
            "Engines whose workers did not answer in time: theirs are the last known values.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._labels: set[str] = set()
        self._gates = {
            key: Gauge(name, text, ["probe"], registry=registry, multiprocess_mode="mostrecent")
            for name, (key, text) in GATE_GAUGES.items()
        }

    def steered(self) -> None:
        """One more request admitted with steering."""
        self._steered.inc()

    def refused(self, reason: str) -> None:
        """One more request refused; `reason` is one of a fixed set."""
        self._refused.labels(reason).inc()

    def acted(self, kind: str, tokens: int) -> None:
        """An intervention of this kind, of which there is a fixed set, acted on so many more tokens."""
        self._acted.labels(kind).inc(tokens)

    def vectors(self, number: int) -> None:
        """How many names are registered."""
        self._vectors.set(number)

    def workers(self, engines: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Take over what the workers of each engine report.

        The ranks of an engine do the same: of an engine the largest value counts, except that kernels are compiled by
        each rank for itself. Engines do different things, which add up.
        """
        for key, gauge in self._gauges.items():
            values = [[status[key] for status in workers if status.get(key) is not None] for workers in engines]
            if any(values):
                gauge.set(sum(sum(own) if key in OF_EACH_RANK else max(own) for own in values if own))
        self._gates_of(engines)

    def silent(self, engines: int) -> None:
        """How many engines did not say anything when they were asked last."""
        self._silent.set(engines)

    def _gates_of(self, engines: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        totals: dict[str, dict[str, float]] = {}
        for workers in engines:
            for label, use in _gate_uses(workers).items():
                # As many as one engine can tell of: labels stay for good, and several engines may know different names.
                known = label in self._labels or len(self._labels) < MOST_LABELS
                probe = label if known else OTHERS
                self._labels.add(probe)
                total = totals.setdefault(probe, {"tokens": 0, "above_half": 0, "mean": 0.0, "lowered": 0})
                tokens = total["tokens"] + use["tokens"]
                if tokens:
                    total["mean"] += (use["mean"] - total["mean"]) * use["tokens"] / tokens
                total["tokens"], total["above_half"] = tokens, total["above_half"] + use["above_half"]
                total["lowered"] += use["lowered"]
        for probe, total in totals.items():
            for key, gauge in self._gates.items():
                gauge.labels(probe).set(total[key])


def _gate_uses(workers: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What an engine's gates did, by probe. Ranks of one stage evaluate the same: who counted most is up to date."""
    uses: dict[str, Mapping[str, Any]] = {}
    for use in (use for status in workers for use in status.get("gates") or ()):
        known = uses.get(use["probe"])
        if known is None or (use["tokens"], use["lowered"]) >= (known["tokens"], known["lowered"]):
            uses[use["probe"]] = use
    return uses


_metrics: Metrics | None = None


def metrics() -> Metrics:
    """This process's metrics: made at the first call, since Prometheus refuses a second of one name."""
    global _metrics
    if _metrics is None:
        _metrics = Metrics()
    return _metrics
