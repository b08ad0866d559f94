"""Every change made to vLLM's engine: the configuration, the engine core, the prefix cache and the workers.

Each does nothing in an engine that is not steered. How a patch is put in, and what happens where vLLM is not what it
was written for, is in `patches.patching`.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from trimtab.engines.vllm.patches.patching import Need, Patch, install_table, patch, require, when_imported
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY, is_configured
from trimtab.errors import SteeringError

SUPPORTED = ((0, 26), (0, 34))  # from, up to and not including

TABLE: list[Patch] = []

# What the process that makes an engine's configuration can check. What workers use is checked in the workers: each is
# asked whether it is attached.
ENGINE_MODULES = {
    "vllm.engine.arg_utils": Need.ALWAYS,
    "vllm.v1.engine.core": Need.ALWAYS,
    "vllm.v1.core.kv_cache_utils": Need.ALWAYS,
    "vllm.v1.core.block_pool": Need.ALWAYS,
}


def install() -> None:
    """Change each vLLM module as soon as it is imported. A second call does nothing."""
    install_table(TABLE)
    for module in ("vllm.v1.core.block_pool", "vllm.v1.simple_kv_offload.manager"):
        when_imported(module, "generate_block_hash_extra_keys", _share_block_keys)
    when_imported("vllm.v1.worker.worker_base", "WorkerBase", _add_worker_methods)


def require_supported() -> None:
    """Raise `SteeringError` where this vLLM is not one that steering was written for.

    Imports what the engine core and the front end use, so that their patches are applied and checked.
    """
    import vllm

    from trimtab.engines.vllm.patches.frontend import FRONT_END_MODULES

    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    low, high = SUPPORTED
    if not low <= version < high:
        raise SteeringError(
            "steering",
            f"vLLM {vllm.__version__} is not supported: versions {low[0]}.{low[1]} to {high[0]}.{high[1] - 1} are",
        )
    require(ENGINE_MODULES | FRONT_END_MODULES)


# --- the configuration


@patch("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "self", "usage_context", "headless", table=TABLE)
def _check_the_configuration(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: the one place where a configuration is complete and not yet in use, in every way of starting vLLM. It is
    checked, and stamped so that compile artifacts of other settings are never loaded: vLLM looks them up before it
    traces the model, by a key that holds additional_config but not our classes.
    Until: vLLM lets a plugin take part in the configuration and in the key of the compile cache.
    """

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        if is_configured(vllm_config):
            from trimtab.engines.vllm.core.checks import prepare_config

            prepare_config(vllm_config)
        return vllm_config

    return create_engine_config


# --- the engine core


@patch("vllm.v1.engine.core", "EngineCore.preprocess_add_request", "self", "request", table=TABLE)
def _check_each_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: the last door before the scheduler; a request refused here is answered with an error, one refused later
    would end the engine. Until: vLLM lets a plugin validate requests in the engine core.
    """

    @functools.wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if is_configured(getattr(self, "vllm_config", None)) or _carries_steering(request):
            from trimtab.engines.vllm.core.checks import check_request

            check_request(self, request)
        return original(self, request)

    return preprocess_add_request


def _carries_steering(request: Any) -> bool:
    extra = getattr(getattr(request, "sampling_params", None), "extra_args", None)
    return isinstance(extra, dict) and SETTINGS_KEY in extra


@patch("vllm.v1.engine.core", "EngineCore._initialize_kv_caches", "self", table=TABLE)
def _check_the_workers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: workers exist from here on, and none has run the model yet. A worker class of another plugin may load its
    model in a way that we do not see; its answers would be unsteered. Until: workers have a hook after loading.
    """

    @functools.wraps(original)
    def _initialize_kv_caches(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_configured(getattr(self, "vllm_config", None)):
            from trimtab.engines.vllm.core.checks import check_workers

            check_workers(self.vllm_config, self.model_executor)
        return original(self, *args, **kwargs)

    return _initialize_kv_caches


@patch("vllm.v1.engine.core", "EngineCore.__init__", "self", "vllm_config", table=TABLE)
def _check_the_prefix_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: only now does the engine core have the block hasher that it will use, and it has seen no request yet.
    Until: requests may bring extra keys per block.
    """

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_configured(getattr(self, "vllm_config", None)):
            from trimtab.engines.vllm.core.checks import check_prefix_cache

            check_prefix_cache(self)

    return initialize


# --- the prefix cache


@patch(
    "vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys",
    "request", "start_token_idx", "end_token_idx", "start_mm_idx",
    table=TABLE, exact=True,
)  # fmt: skip
def _add_block_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: KV of steered tokens must be found by steered requests alone. A cache salt cannot say that an answer was
    steered and its prompt was not. Until: requests may bring extra keys per block.
    """
    from trimtab.engines.vllm.core.cache_keys import steering_keys

    @functools.wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        ours = steering_keys(request, start_token_idx, end_token_idx)
        return ((*(keys or ()), *ours) if ours else keys), next_mm_idx

    return generate_block_hash_extra_keys


def _share_block_keys(module: Any) -> None:
    """Why: these modules bind the function's name when they are imported. Until: as above."""
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    if hasattr(module, "generate_block_hash_extra_keys"):
        module.generate_block_hash_extra_keys = utils.generate_block_hash_extra_keys


# --- the workers


def _add_worker_methods(module: ModuleType) -> None:
    """Why: collective_rpc finds methods by name on the worker. Until: plugins may register such methods."""
    from trimtab.engines.vllm.worker import worker

    for method in (worker.trimtab_attached, worker.trimtab_problems, worker.trimtab_status):
        setattr(module.WorkerBase, method.__name__, method)


@patch("vllm.v1.worker.gpu_worker", "Worker.load_model", "self", table=TABLE)
def _steer_the_loaded_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: the model is loaded and not yet traced. The CPU and XPU workers inherit this method. Until: workers have a
    hook after loading (0.33 has one after init_device, which is too early).
    """

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if is_configured(getattr(self, "vllm_config", None)):
            from trimtab.engines.vllm.worker.worker import attach_worker

            attach_worker(self)
        return result

    return load_model
