"""The entry point in `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Importing this module imports neither torch nor vLLM's engine, and an engine without `steering` in its
`additional_config` runs as if trimtab were not installed.
"""

from collections.abc import Mapping
from typing import Any


def register() -> None:
    """Install the patches of this process; vLLM may call it more than once.

    vLLM ends where a plugin raises, so nothing is raised here: what cannot be installed is noted, and an engine that is
    to be steered says so at its start.
    """
    from trimtab.engines.vllm.patches.patching import guarded, install_table
    from trimtab.engines.vllm.patches.tables import TABLES
    from trimtab.engines.vllm.settings.travelling import Travelling

    Travelling.arrive = _arrived
    for process, table in TABLES.items():
        guarded(f"the {process}", install_table, table)


def _arrived(additional_config: Mapping[str, Any]) -> Mapping[str, Any]:
    from trimtab.engines.vllm.settings.travelling import Travelling

    register()
    return Travelling(additional_config)
