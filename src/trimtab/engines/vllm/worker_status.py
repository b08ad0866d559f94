"""What only the workers know, asked of them through the engine's client: their state, and what gates did."""

import asyncio
import logging
import time
from typing import Any

from trimtab.engines.vllm.doors import current_front_end
from trimtab.engines.vllm.metrics import metrics

WORKER_METHOD = "trimtab_status"
GATES_METHOD = "trimtab_gates"

_STATUS_AGE = 1.0  # seconds for which a scrape of /metrics reuses the last answer of the workers
_STATUS_TIMEOUT = 5.0  # seconds

logger = logging.getLogger("vllm.trimtab")


class Workers:
    """Asks the workers of every engine for their state, at most once a second for the metrics page."""

    def __init__(self) -> None:
        self.client: Any = None
        self._asked = -_STATUS_AGE

    async def ask(self) -> dict[int, list[dict[str, Any]]]:
        """The state of each worker, by the data-parallel rank of its engine: 0 where there is one engine."""
        answers = await self._call(WORKER_METHOD)
        return {engine: [state for state in states if isinstance(state, dict)] for engine, states in answers.items()}

    async def gates(self, request_id: str) -> list[dict[str, Any]]:
        """What each gate of a request did: from the worker that evaluated it; ranks that share one count the same."""
        answers = await self._call(GATES_METHOD, request_id)
        uses: dict[str, dict[str, Any]] = {}
        for use in (use for workers in answers.values() for worker in workers for use in worker):
            if use["tokens"] >= uses.get(use["gate"], {"tokens": 0})["tokens"]:
                uses[use["gate"]] = use
        return [uses[gate] for gate in sorted(uses)]

    async def refresh_metrics(self) -> None:
        """Bring the gauges up to date; the page is served with the old ones where the workers do not answer."""
        if time.monotonic() - self._asked < _STATUS_AGE:
            return
        self._asked = time.monotonic()
        try:
            engines = await asyncio.wait_for(self.ask(), _STATUS_TIMEOUT)
        except Exception as error:  # a metrics page must not fail because an engine is stopping
            logger.warning("steering metrics are stale: %s", error)
            return
        metrics().workers(list(engines.values()))
        if (front_end := current_front_end()) is not None:
            metrics().vectors(len(front_end.registry.vectors()))

    async def _call(self, method: str, *args: Any) -> dict[int, list[Any]]:
        """What each worker answers, by engine."""
        if self.client is None:
            return {}
        core = self.client.engine_core
        # Why not `collective_rpc`: it asks every engine, and returns what the first one answers. Until: it returns all.
        calls = [
            core._call_utility_async("collective_rpc", method, _STATUS_TIMEOUT, args, None, engine=engine)
            for engine in core.core_engines
        ]
        ranks = [int.from_bytes(engine, "little") for engine in core.core_engines]  # vLLM names an engine by its rank
        return dict(zip(ranks, await asyncio.gather(*calls), strict=True))
