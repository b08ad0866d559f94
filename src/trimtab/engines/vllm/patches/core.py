"""Every change made to vLLM's engine core and its prefix cache.

Each does nothing in an engine that is not steered. How a patch is put in, and what happens where vLLM is not what it
was written for, is in `patches.patching`.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.engines.vllm.patches.patching import Need, Patch, is_patched, patch, put_on
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY, is_configured

TABLE: list[Patch] = []

STEERED: list[Patch] = []  # put on each engine core that is steered

SCHEDULER: list[Patch] = []  # put on the scheduler of each


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
def _prepare_the_core(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: only now does the engine core have the block hasher and the scheduler that it will use, and it has seen no
    request yet; what requests refer to is read before the first. Until: requests may bring extra keys per block, and
    plugins may hold requests back.
    """

    @functools.wraps(original)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_configured(getattr(self, "vllm_config", None)):
            from trimtab.engines.vllm.core.checks import served_by
            from trimtab.engines.vllm.core.row_pool import RowGate

            served = served_by(self)
            assert served is not None, "it is configured"
            put_on(self, STEERED)
            self._trimtab_rows = RowGate(self.scheduler, served[0])
            put_on(self.scheduler, SCHEDULER, self._trimtab_rows)
            self._trimtab_rows.require_asked(*_QUESTIONS)

    return initialize


@patch("vllm.v1.engine.core", "EngineCore.trimtab_status", adds=True, table=TABLE)
def _say_what_is_on(_: None) -> Callable[..., Any]:
    """Why: a client's utility calls find methods by name on the engine core. Until: plugins may register such."""

    def trimtab_status(self: Any, digest: bool = True, answers: Sequence[str] = ()) -> list[Any]:
        from trimtab.engines.vllm.core.row_pool import status

        return status(self, digest, answers)

    return trimtab_status


# --- the scheduler

_SCHEDULER = "vllm.v1.core.sched.scheduler"
_QUESTIONS = ("_handle_blocked_waiting_request", "_try_promote_blocked_waiting_request")
_ON_SCHEDULER: dict[str, Any] = {"table": SCHEDULER, "on": "each steered scheduler"}


@patch(_SCHEDULER, f"Scheduler.{_QUESTIONS[0]}", "self", "request", optional=True, **_ON_SCHEDULER)
def _hold_back(original: Callable[..., Any], rows: Any) -> Callable[..., Any]:
    """Why: the one question that the scheduler asks of each waiting request before it runs it; who has no rows waits.
    Until: plugins may hold requests back.
    """

    def _handle_blocked_waiting_request(request: Any) -> bool:
        return bool(original(request)) and rows.may_run(request)

    return _handle_blocked_waiting_request


@patch(_SCHEDULER, f"Scheduler.{_QUESTIONS[1]}", "self", "request", optional=True, **_ON_SCHEDULER)
def _hold_back_before_0_32(original: Callable[..., Any], rows: Any) -> Callable[..., Any]:
    """Why: here the question comes in two parts, the first by status alone, of which queueing makes use as well. So for
    the loop every waiting request is taken to be blocked, this part tells, and queueing keeps to the status. Until:
    0.32 is the oldest vLLM that is supported.
    """
    scheduler = rows.scheduler
    rows.require_queue("skipped_waiting", without="kv_holding_waiting")
    is_blocked = scheduler._is_blocked_waiting_status

    def _try_promote_blocked_waiting_request(request: Any) -> bool:
        return (not is_blocked(request.status) or bool(original(request))) and rows.may_run(request)

    def _enqueue_waiting_request(request: Any) -> None:
        (scheduler.skipped_waiting if is_blocked(request.status) else scheduler.waiting).add_request(request)

    scheduler._enqueue_waiting_request = _enqueue_waiting_request
    scheduler._is_blocked_waiting_status = lambda status: True
    return _try_promote_blocked_waiting_request


@patch(_SCHEDULER, "Scheduler.schedule", "self", **_ON_SCHEDULER)
def _ask_few_in_vain(original: Callable[..., Any], rows: Any) -> Callable[..., Any]:
    """Why: the scheduler asks every waiting request in every step, also where no one can have rows before another
    ends; for 450 that wait this took a tenth of the throughput. Before 0.32 it also asks those whose blocks arrive
    behind those that need them. Until: plugins may hold requests back.
    """

    def schedule(*args: Any, **kwargs: Any) -> Any:
        rows.blocks_first()
        with rows.a_step():
            return original(*args, **kwargs)

    return schedule


@patch(_SCHEDULER, "Scheduler._free_request", "self", "request", **_ON_SCHEDULER)
def _see_who_ends(original: Callable[..., Any], rows: Any) -> Callable[..., Any]:
    """Why: whatever ends a request (a stop, an abort, an error, a shutdown) ends it here, whether it ran or waited, and
    its rows are free. Until: plugins may hold requests back.
    """

    def _free_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        rows.ended(request)
        return original(request, *args, **kwargs)

    return _free_request


# --- the prefix cache

_BLOCK_KEYS = ("generate_block_hash_extra_keys", "request", "start_token_idx", "end_token_idx", "start_mm_idx")


@patch("vllm.v1.core.kv_cache_utils", *_BLOCK_KEYS, table=TABLE, exact=True)
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


@patch("vllm.v1.core.block_pool", *_BLOCK_KEYS, table=TABLE, exact=True, optional=True)
@patch(
    "vllm.v1.simple_kv_offload.manager", *_BLOCK_KEYS,
    table=TABLE, exact=True, optional=True, need=Need.BY_VERSION, at_start=False,
)  # fmt: skip
def _share_block_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: these modules bind the function's name when they are imported. Until: requests may bring extra keys per
    block.
    """
    ours: Callable[..., Any] = _defined_block_keys()
    if not is_patched(ours):
        raise RuntimeError("it is not replaced where it is defined")
    return ours


@patch("vllm.v1.engine.core", "EngineCore.request_block_hasher", table=STEERED, on="each steered engine core")
def _hash_what_was_read(original: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Why: what has no keys would be shared with everyone, so a steered engine hashes no request whose steering it has
    not read, and starts only if its own hasher is seen to ask for the keys. Until: requests may bring extra keys.
    """
    from trimtab.engines.vllm.core.cache_keys import checked_hasher, passed_by

    if original is None:  # no prefix cache
        return None
    hasher = checked_hasher(original)
    ours = _defined_block_keys()
    for module in sorted(key for key in sys.modules if key.startswith("vllm.")):
        bound = vars(sys.modules[module]).get(_BLOCK_KEYS[0], ours)
        if bound is not ours and not is_patched(bound):
            raise passed_by(f"is not the only one: {module}.{_BLOCK_KEYS[0]} is vLLM's own")
    return hasher


def _defined_block_keys() -> Any:
    return getattr(importlib.import_module("vllm.v1.core.kv_cache_utils"), _BLOCK_KEYS[0])
