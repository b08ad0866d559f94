"""The entry point in `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Importing this module imports neither torch nor vLLM's engine, and an engine without `steering` in its
`additional_config` runs as if trimtab were not installed.
"""

from typing import Any


def register() -> None:
    """Install the patches of this process; vLLM may call it more than once.

    vLLM ends where a plugin raises, so nothing is raised here: what cannot be installed is noted, and an engine that is
    to be steered says so at its start.
    """
    from trimtab.engines.vllm.frontend.admission import build_front_end
    from trimtab.engines.vllm.patches import engine as engine_patches
    from trimtab.engines.vllm.patches import frontend as frontend_patches
    from trimtab.engines.vllm.patches.patching import guarded

    guarded("the engine", engine_patches.install)
    guarded("the front end", frontend_patches.install, build_front_end)


class Travelling(dict[str, Any]):
    """The `additional_config` of a steered engine. Whoever unpickles it has the patches of his process installed.

    A front end may get its configuration from another process, which made it, and then calls nothing that loads
    plugins: Ray Serve LLM's replicas do. It is a plain dict for all else, hashes and JSON included.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (dict(self),)


def _arrived(additional_config: dict[str, Any]) -> Travelling:
    register()
    return Travelling(additional_config)
