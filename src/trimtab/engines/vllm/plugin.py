"""The entry point in `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Importing this module imports neither torch nor vLLM's engine, and an engine without `steering` in its
`additional_config` runs as if trimtab were not installed.
"""


def register() -> None:
    """Install the patches of this process; vLLM may call it more than once.

    vLLM ends where a plugin raises, so nothing is raised here: what cannot be installed is noted, and an engine that is
    to be steered says so at its start.
    """
    from trimtab.engines.vllm import compat, compat_frontend
    from trimtab.engines.vllm.compat_patching import guarded
    from trimtab.engines.vllm.frontend import build_front_end

    guarded("the engine", compat.install)
    guarded("the front end", compat_frontend.install, build_front_end)
