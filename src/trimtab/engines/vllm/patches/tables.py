"""All patches, by the process whose vLLM they change."""

from trimtab.engines.vllm.patches import core, frontend, http, settings, worker
from trimtab.engines.vllm.patches.patching import Patch

TABLES: dict[str, list[Patch]] = {
    "configuration": [*settings.TABLE, *settings.PARSER],
    "front end": frontend.TABLE,
    "HTTP server": http.TABLE,
    "engine core": [*core.TABLE, *core.STEERED, *core.SCHEDULER],
    "worker": [*worker.TABLE, *worker.WORKER, *worker.RUNNER_V1, *worker.RUNNER_V2],
}


def all_patches() -> list[Patch]:
    """Every row of every table."""
    return [row for table in TABLES.values() for row in table]
