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
    """Asks the workers for their state, at most once a second for the metrics page."""

    def __init__(self) -> None:
        self.client: Any = None
        self._asked = -_STATUS_AGE

    async def ask(self) -> list[dict[str, Any]]:
        """One dict per worker, of the first engine if there are several."""
        if self.client is None:
            return []
        answers = await self.client.collective_rpc(WORKER_METHOD, timeout=_STATUS_TIMEOUT)
        return [answer for answer in answers if isinstance(answer, dict)]

    async def gates(self, request_id: str) -> list[dict[str, Any]]:
        """What each gate of a request did: from the worker that evaluated it; ranks that share one count the same."""
        if self.client is None:
            return []
        answers = await self.client.collective_rpc(GATES_METHOD, timeout=_STATUS_TIMEOUT, args=(request_id,))
        uses: dict[str, dict[str, Any]] = {}
        for use in (use for answer in answers for use in answer):
            if use["tokens"] >= uses.get(use["gate"], {"tokens": 0})["tokens"]:
                uses[use["gate"]] = use
        return [uses[gate] for gate in sorted(uses)]

    async def refresh_metrics(self) -> None:
        """Bring the gauges up to date; the page is served with the old ones where the workers do not answer."""
        if time.monotonic() - self._asked < _STATUS_AGE:
            return
        self._asked = time.monotonic()
        try:
            statuses = await asyncio.wait_for(self.ask(), _STATUS_TIMEOUT)
        except Exception as error:  # a metrics page must not fail because an engine is stopping
            logger.warning("steering metrics are stale: %s", error)
            return
        metrics().workers(statuses)
        if (front_end := current_front_end()) is not None:
            metrics().vectors(len(front_end.registry.vectors()))
