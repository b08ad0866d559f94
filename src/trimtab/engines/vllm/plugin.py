"""The entry point in `vllm.general_plugins`: vLLM calls `register` in each of its processes.

Importing this module imports neither torch nor vLLM's engine, and an engine without `steering` in its
`additional_config` runs as if trimtab were not installed.
"""


def register() -> None:
    """Install the patches of this process; vLLM may call it more than once."""
    from trimtab.engines.vllm import compat, compat_frontend
    from trimtab.engines.vllm.frontend import build_front_end

    compat.install()
    compat_frontend.install(build_front_end)
