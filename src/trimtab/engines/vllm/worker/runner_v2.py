"""Drive the steering runtime from vLLM's V2 model runner (`vllm.v1.worker.gpu.model_runner`).

Requests come and go through `add_requests` and `_remove_request`, preempted ones too. `prepare_inputs` runs once per
real step; its arguments change from version to version, so only the `InputBatch` that it returns is used. Dummy,
profile and capture runs build their batches elsewhere.
"""

from dataclasses import fields
from typing import Any

from trimtab.engines.vllm.carried import owner_of, steering_of
from trimtab.engines.vllm.patches.patching import wrap_method
from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.worker.membership import Membership
from trimtab.errors import SteeringError
from trimtab.runtime import SteeringRuntime

_BATCH_FIELDS = {
    "req_ids",
    "idx_mapping_np",
    "num_computed_tokens_np",
    "num_scheduled_tokens",
    "num_tokens_after_padding",
}


def drive_v2(runner: Any, runtime: SteeringRuntime, settings: SteeringSettings, max_requests: int) -> None:
    """Wrap the three methods of this runner. Raises `SteeringError` where they are not as expected."""
    _require_batch_fields()
    members = Membership(runtime, max_requests)

    def wrap_remove(original: Any) -> Any:
        def _remove_request(req_id: str) -> Any:
            members.leave_soon(req_id)
            return original(req_id)

        return _remove_request

    def wrap_add(original: Any) -> Any:
        def add_requests(scheduler_output: Any) -> Any:
            result = original(scheduler_output)
            members.settle()  # an engine that falls idle tells who has finished, and prepares no further step
            for new in scheduler_output.scheduled_new_reqs:
                steering = steering_of(new.sampling_params, settings)
                owner = owner_of(new.sampling_params, new.req_id)
                members.join(new.req_id, steering, scheduler_output.num_scheduled_tokens, owner)
            return result

        return add_requests

    def wrap_prepare(original: Any) -> Any:
        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            batch = original(*args, **kwargs)
            members.settle()
            runtime.step(
                batch.req_ids,
                batch.num_computed_tokens_np,
                batch.num_scheduled_tokens,
                # A prompt's own length. A request that comes back from preemption prefills its answer so far as well.
                runner.req_states.prompt_len.np[batch.idx_mapping_np],
                padded_tokens=batch.num_tokens_after_padding,
            )
            return batch

        return prepare_inputs

    wrap_method(runner, "_remove_request", ("req_id",), wrap_remove)
    wrap_method(runner, "add_requests", ("scheduler_output",), wrap_add)
    wrap_method(runner, "prepare_inputs", ("scheduler_output",), wrap_prepare)


def _require_batch_fields() -> None:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    if missing := _BATCH_FIELDS - {field.name for field in fields(InputBatch)}:
        names = ", ".join(sorted(missing))
        raise SteeringError("steering", f"trimtab does not know this vLLM: InputBatch lacks {names}")
