"""Prometheus metrics of the front end, on the `/metrics` page that vLLM serves already.

Requests are counted where they are admitted, in the API server. What only workers know (rows, uploads, late kernel
variants) is asked of them when the page is read, and shown as gauges: with several API servers each sees the same
workers, so the latest value counts and a sum would be wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

WORKER_GAUGES = {
    "trimtab_rows_in_use": ("rows_in_use", "Steering table rows that running requests hold."),
    "trimtab_row_capacity": ("capacity", "Steering table rows that requests can hold."),
    "trimtab_row_uploads_total": ("row_uploads", "Rows written to the steering tables since start."),
    "trimtab_late_kernel_variants_total": (
        "late_variants",
        "Kernel variants compiled after warm-up, all workers.",
    ),
}


class Metrics:
    """The metrics, registered once per Prometheus registry; an `Observer` for the front end."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._steered = Counter("trimtab_requests_steered", "Requests admitted with steering.", registry=registry)
        self._refused = Counter(
            "trimtab_requests_refused", "Requests refused for their steering, by reason.", ["reason"], registry=registry
        )
        self._vectors = Gauge(
            "trimtab_vectors", "Registered vectors.", registry=registry, multiprocess_mode="mostrecent"
        )
        self._gauges = {
            key: Gauge(name, text, registry=registry, multiprocess_mode="mostrecent")
            for name, (key, text) in WORKER_GAUGES.items()
        }

    def steered(self) -> None:
        """One more request admitted with steering."""
        self._steered.inc()

    def refused(self, reason: str) -> None:
        """One more request refused; `reason` is one of a fixed set."""
        self._refused.labels(reason).inc()

    def vectors(self, number: int) -> None:
        """How many names are registered."""
        self._vectors.set(number)

    def workers(self, statuses: Sequence[Mapping[str, Any]]) -> None:
        """Take over what the workers report: the largest value, for late variants the sum."""
        for key, gauge in self._gauges.items():
            values = [status[key] for status in statuses if status.get(key) is not None]
            if values:
                gauge.set(sum(values) if key == "late_variants" else max(values))


_metrics: Metrics | None = None


def metrics() -> Metrics:
    """This process's metrics: made at the first call, since Prometheus refuses a second of one name."""
    global _metrics
    if _metrics is None:
        _metrics = Metrics()
    return _metrics
