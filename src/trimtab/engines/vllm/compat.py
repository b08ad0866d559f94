"""Every change made to vLLM's engine: the engine core, the prefix cache and the workers.

Each patch says why it exists and until when, checks what it replaces, is marked on its target, and does nothing in an
engine that is not steered. A module is patched when vLLM imports it, so nothing is imported early and each process pays
for what it uses. Where vLLM is not what a patch was written for, the patch is left out and noted: an engine without
steering runs on as if trimtab were not installed, and one with steering does not start.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from trimtab.errors import SteeringError

SUPPORTED = ((0, 26), (0, 34))  # from, up to and not including

_MARK = "__trimtab_engine_patch__"

_problems: list[str] = []


def install() -> None:
    """Patch each vLLM module as soon as it is imported, those already imported at once. A second call does nothing."""
    for module, patch in _PATCHES.items():
        _when_imported(module, patch)


def require_supported() -> None:
    """Raise `SteeringError` where this vLLM is not one that steering was written for.

    Imports the modules that the engine core uses, so that their patches are applied and checked. What workers use is
    checked in the workers: `_initialize_kv_caches` asks each whether it is attached.
    """
    import vllm

    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    low, high = SUPPORTED
    if not low <= version < high:
        raise SteeringError(
            "steering",
            f"vLLM {vllm.__version__} is not supported: versions {low[0]}.{low[1]} to {high[0]}.{high[1] - 1} are",
        )
    for module in ("vllm.v1.engine.core", "vllm.v1.core.kv_cache_utils", "vllm.v1.core.block_pool"):
        importlib.import_module(module)
    if _problems:
        raise SteeringError("steering", f"trimtab does not know this vLLM {vllm.__version__}: {'; '.join(_problems)}")


# --- the configuration


def _patch_arg_utils(module: ModuleType) -> None:
    # Why: the one place where a configuration is complete and not yet in use, in every way of starting vLLM. It is
    # checked, and stamped so that compile artifacts of other settings are never loaded: vLLM looks them up before it
    # traces the model, by a key that holds additional_config but not our classes.
    # Until: vLLM lets a plugin take part in the configuration and in the key of the compile cache.
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            from trimtab.engines.vllm.start import prepare_config

            prepare_config(vllm_config)
            return vllm_config

        return create_engine_config

    _patch(module.EngineArgs, "create_engine_config", ("self", "usage_context", "headless"), wrap)


# --- the engine core


def _patch_engine_core(module: ModuleType) -> None:
    # Why: the last door before the scheduler; a request refused here is answered with an error, one refused later would
    # end the engine. Until: vLLM lets a plugin validate requests in the engine core.
    def wrap_request(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def preprocess_add_request(self: Any, request: Any) -> Any:
            from trimtab.engines.vllm.start import check_request

            check_request(self, request)
            return original(self, request)

        return preprocess_add_request

    # Why: workers exist from here on, and none has run the model yet. A worker class of another plugin may load its
    # model in a way that we do not see; its answers would be unsteered. Until: workers have a hook after loading.
    def wrap_caches(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _initialize_kv_caches(self: Any, *args: Any, **kwargs: Any) -> Any:
            from trimtab.engines.vllm.start import check_workers

            check_workers(self.vllm_config, self.model_executor)
            return original(self, *args, **kwargs)

        return _initialize_kv_caches

    _patch(module.EngineCore, "preprocess_add_request", ("self", "request"), wrap_request)
    _patch(module.EngineCore, "_initialize_kv_caches", ("self",), wrap_caches)


# --- the prefix cache


def _patch_kv_cache_utils(module: ModuleType) -> None:
    # Why: KV of steered tokens must be found by steered requests alone. A cache salt cannot say that an answer was
    # steered and its prompt was not. Until: requests may bring extra keys per block.
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        from trimtab.engines.vllm.cache_keys import steering_keys

        @functools.wraps(original)
        def generate_block_hash_extra_keys(
            request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
        ) -> tuple[tuple[Any, ...] | None, int]:
            keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
            ours = steering_keys(request, start_token_idx, end_token_idx)
            return ((*(keys or ()), *ours) if ours else keys), next_mm_idx

        return generate_block_hash_extra_keys

    _patch(
        module,
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        wrap,
        exact=True,
    )


def _share_block_keys(module: ModuleType) -> None:
    # Why: these modules bind the function's name when they are imported. Until: as above.
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    if not hasattr(module, "generate_block_hash_extra_keys"):
        return
    module.generate_block_hash_extra_keys = utils.generate_block_hash_extra_keys  # type: ignore[attr-defined]


# --- the workers


def _patch_worker_base(module: ModuleType) -> None:
    # Why: collective_rpc finds methods by name on the worker. Until: plugins may register such methods.
    from trimtab.engines.vllm import worker

    for method in (worker.trimtab_attached, worker.trimtab_status):
        setattr(module.WorkerBase, method.__name__, method)


def _patch_gpu_worker(module: ModuleType) -> None:
    # Why: the model is loaded and not yet traced. The CPU and XPU workers inherit this method. Until: workers have a
    # hook after loading (0.33 has one after init_device, which is too early).
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            from trimtab.engines.vllm.worker import attach_worker

            attach_worker(self)
            return result

        return load_model

    _patch(module.Worker, "load_model", ("self",), wrap)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "vllm.engine.arg_utils": _patch_arg_utils,
    "vllm.v1.engine.core": _patch_engine_core,
    "vllm.v1.core.kv_cache_utils": _patch_kv_cache_utils,
    "vllm.v1.core.block_pool": _share_block_keys,
    "vllm.v1.simple_kv_offload.manager": _share_block_keys,
    "vllm.v1.worker.worker_base": _patch_worker_base,
    "vllm.v1.worker.gpu_worker": _patch_gpu_worker,
}


# --- patching


def wrap_method(owner: Any, name: str, first: Sequence[str], wrap: Callable[[Any], Any]) -> None:
    """Replace a method of one object. Raises `SteeringError` unless its parameters start with `first`."""
    if (problem := _mismatch(owner, name, first, exact=False)) is not None:
        raise SteeringError("steering", f"trimtab does not know this vLLM: {problem}")
    setattr(owner, name, wrap(getattr(owner, name)))


def _patch(owner: Any, name: str, first: Sequence[str], wrap: Callable[[Any], Any], *, exact: bool = False) -> None:
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return
    if (problem := _mismatch(owner, name, first, exact=exact)) is not None:
        _problems.append(problem)
        return
    replacement = wrap(original)
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)


def _mismatch(owner: Any, name: str, first: Sequence[str], *, exact: bool) -> str | None:
    where = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    target = getattr(owner, name, None)
    if target is None:
        return f"{where} is gone"
    found = list(inspect.signature(target).parameters)
    if found[: len(first)] != list(first) or (exact and len(found) != len(first)):
        return f"{where} takes ({', '.join(found)}), not ({', '.join(first)}{'' if exact else ', ...'})"
    return None


def _when_imported(name: str, patch: Callable[[ModuleType], None]) -> None:
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        patch(module)
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _PatchingFinder)), None)
    if finder is None:
        finder = _PatchingFinder()
        sys.meta_path.insert(0, finder)
    finder.patches[name] = patch


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: hands on what the others find, and patches the modules it knows once they are executed."""

    def __init__(self) -> None:
        self.patches: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patch = self.patches.get(fullname)
        if patch is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            _patch_after_execution(spec.loader, patch)
        return spec


def _patch_after_execution(loader: Any, patch: Callable[[ModuleType], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        patch(module)

    loader.exec_module = exec_module
