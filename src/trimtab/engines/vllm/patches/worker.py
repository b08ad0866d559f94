"""Every change made to vLLM's workers and their model runners.

The first table changes classes, and does nothing in a worker that is not steered. The patches of the others are put on
the worker and the runner whose model has just been attached, whatever class they are of: runners of other platforms
have methods of their own. How a patch is put in is in `patches.patching`.
"""

import functools
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm.patches.patching import Patch, patch, problems, put_on
from trimtab.engines.vllm.settings.flags import is_configured

TABLE: list[Patch] = []

WORKER: list[Patch] = []  # put on each steered worker

RUNNER_V1: list[Patch] = []  # put on each steered runner of its kind

RUNNER_V2: list[Patch] = []

_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"

# Workers are asked whether they are attached, so a process that has none imports none of these.
_ROW: dict[str, Any] = {"table": TABLE, "at_start": False}
_ON_WORKER: dict[str, Any] = {"table": WORKER, "at_start": False, "on": "each steered worker"}
_ON_V1: dict[str, Any] = {"table": RUNNER_V1, "at_start": False, "on": "each steered V1 runner"}
_ON_V2: dict[str, Any] = {"table": RUNNER_V2, "at_start": False, "on": "each steered V2 runner"}

Make = Callable[..., Any]


@patch("vllm.v1.worker.gpu_worker", "Worker.load_model", "self", **_ROW)
def _steer_the_loaded_model(original: Make) -> Make:
    """Why: the model is loaded and not yet traced. The CPU and XPU workers inherit this method. Until: workers have a
    hook after loading (0.33 has one after init_device, which is too early).
    """

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if is_configured(getattr(self, "vllm_config", None)):
            from trimtab.engines.vllm.worker.worker import attach_worker, is_v2

            steering = attach_worker(self)
            if steering.drive is not None:
                put_on(self.model_runner, RUNNER_V2 if is_v2(self.model_runner) else RUNNER_V1, steering)
            put_on(self, WORKER, self)
        return result

    return load_model


# --- what is asked of workers


@patch("vllm.v1.worker.worker_base", "WorkerBase.trimtab_attached", adds=True, **_ROW)
def _say_whether_attached(_: None) -> Make:
    """Why: collective_rpc finds methods by name on the worker. Until: plugins may register such methods."""

    def trimtab_attached(self: Any) -> str:
        """How this worker's model is steered: the digest of its configuration's stamp; "" if it is not."""
        from trimtab.engines.vllm.settings.stamp import stamp_digest

        return "" if getattr(self, "_trimtab", None) is None else stamp_digest(self.vllm_config)

    return trimtab_attached


@patch("vllm.v1.worker.worker_base", "WorkerBase.trimtab_problems", adds=True, **_ROW)
def _say_what_is_missing(_: None) -> Make:
    """Why: an engine whose workers are not attached says why, and collective_rpc finds methods by name. Until: plugins
    may register such methods.
    """

    def trimtab_problems(self: Any) -> list[str]:
        """What trimtab lacks in this worker's vLLM."""
        return list(problems)

    return trimtab_problems


@patch("vllm.v1.worker.worker_base", "WorkerBase.trimtab_status", adds=True, **_ROW)
def _say_what_is_on(_: None) -> Make:
    """Why: what rows, kernels and gates do, only workers know. Until: plugins may register such methods."""

    def trimtab_status(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is on, in plain values: see `worker_status`."""
        from trimtab.engines.vllm.worker.worker import worker_status

        return worker_status(self, *args, **kwargs)

    return trimtab_status


# --- a steered worker


@patch("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model", "self", **_ON_WORKER)
def _check_after_warm_up(original: Make, worker: Any) -> Make:
    """Why: our kernels are warmed before graphs are captured, and the compiled model is tried before it serves. Until:
    workers have a hook before and after their warm-up.
    """
    from trimtab.engines.vllm.worker.worker import after_warm_up, before_warm_up

    def compile_or_warm_up_model(*args: Any, **kwargs: Any) -> Any:
        before_warm_up(worker)
        result = original(*args, **kwargs)
        after_warm_up(worker)
        return result

    return compile_or_warm_up_model


# --- a steered runner; `steering` is what its worker keeps


@patch(_V1, "GPUModelRunner.model_memory_usage", optional=True, **_ON_V1)
@patch(_V2, "GPUModelRunner.model_memory_usage", optional=True, **_ON_V2)
def _count_the_tables(original: int, steering: Any) -> int:
    """Why: before 0.32, the size of the KV cache is reckoned from the weights and the peak of the profile run; what is
    allocated between the two is in neither. Until: 0.26 is not supported any more. Newer versions measure what is gone
    from the device.
    """
    from trimtab.engines.vllm.worker.worker import unmeasured_bytes

    return original + unmeasured_bytes(steering)


@patch(_V1, "GPUModelRunner._dummy_run", "self", "num_tokens", **_ON_V1)
@patch(_V2, "GPUModelRunner._dummy_run", "self", "num_tokens", **_ON_V2)
def _count_before_dummy_runs(original: Make, steering: Any) -> Make:
    """Why: an engine without requests of its own runs the model with those that have some (data parallelism), and what
    gates did in its last step is not to be counted again. Until: runners tell of such runs.
    """

    def _dummy_run(*args: Any, **kwargs: Any) -> Any:
        steering.runtime.before_unplanned_pass()
        return original(*args, **kwargs)

    return _dummy_run


@patch(_V1, "GPUModelRunner._update_states", "self", "scheduler_output", **_ON_V1)
def _see_who_has_gone(original: Make, steering: Any) -> Make:
    """Why: rows of requests that have ended are free. Until: runners tell plugins of requests that come and go."""

    def _update_states(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        steering.drive.before_states(scheduler_output)
        return original(scheduler_output, *args, **kwargs)

    return _update_states


@patch(_V1, "GPUModelRunner._prepare_inputs", "self", "scheduler_output", "num_scheduled_tokens", **_ON_V1)
def _plan_the_step(original: Make, steering: Any) -> Make:
    """Why: it runs once per real step, in batch order, before the forward pass and under the event that guards vLLM's
    own pinned buffers. What it returns differs between versions and is handed on as it is. Until: runners have a hook
    before a step.
    """

    def _prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        steering.drive.plan(scheduler_output, num_scheduled_tokens)
        return result

    return _prepare_inputs


@patch(_V2, "GPUModelRunner._remove_request", "self", "req_id", **_ON_V2)
def _see_who_leaves(original: Make, steering: Any) -> Make:
    """Why: rows of requests that have ended or are preempted are free. Until: runners tell plugins of requests."""

    def _remove_request(req_id: str) -> Any:
        steering.drive.before_removal(req_id)
        return original(req_id)

    return _remove_request


@patch(_V2, "GPUModelRunner.add_requests", "self", "scheduler_output", **_ON_V2)
def _see_who_comes(original: Make, steering: Any) -> Make:
    """Why: new requests, and those that come back from preemption, bring their steering here, and an engine that falls
    idle tells here who has finished. Until: runners tell plugins of requests that come and go.
    """

    def add_requests(scheduler_output: Any) -> Any:
        result = original(scheduler_output)
        steering.drive.added(scheduler_output)
        return result

    return add_requests


@patch(_V2, "GPUModelRunner.prepare_inputs", "self", "scheduler_output", **_ON_V2)
def _plan_the_batch(original: Make, steering: Any) -> Make:
    """Why: it runs once per real step, before the forward pass. Its arguments change from version to version, so only
    the `InputBatch` that it returns is used. Until: runners have a hook before a step.
    """

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        steering.drive.plan(batch)
        return batch

    return prepare_inputs
