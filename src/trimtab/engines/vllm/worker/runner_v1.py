"""Drive the steering runtime from vLLM's V1 model runner (`vllm.v1.worker.gpu_model_runner`).

`_update_states` says who has gone. `_prepare_inputs` runs once per real step, in batch order, before the forward pass
and under the event that guards vLLM's own pinned buffers. Dummy, profile and capture runs call neither, and see the
buffers as the last real step left them: row 0 everywhere until the first request.
"""

from typing import Any

from trimtab.engines.vllm.carried import owner_of, steering_of
from trimtab.engines.vllm.patches.patching import wrap_method
from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.worker.membership import Membership
from trimtab.runtime import SteeringRuntime


def drive_v1(runner: Any, runtime: SteeringRuntime, settings: SteeringSettings, max_requests: int) -> None:
    """Wrap the two methods of this runner. Raises `SteeringError` where they are not as expected."""
    members = Membership(runtime, max_requests)

    def wrap_states(original: Any) -> Any:
        def _update_states(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            # A set of strings is iterated in another order in each process: sorted, so that ranks free rows alike.
            members.leave(sorted(scheduler_output.finished_req_ids))
            return original(scheduler_output, *args, **kwargs)

        return _update_states

    def wrap_inputs(original: Any) -> Any:
        def _prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
            # What it returns differs between versions; it is handed on as it is.
            result = original(scheduler_output, num_scheduled_tokens, *args, **kwargs)
            batch = runner.input_batch
            count = batch.num_reqs
            request_ids = batch.req_ids[:count]
            for request_id in members.new(request_ids):
                params = runner.requests[request_id].sampling_params
                members.join(request_id, steering_of(params, settings), request_ids, owner_of(params, request_id))
            runtime.step(
                request_ids,
                batch.num_computed_tokens_cpu[:count],
                num_scheduled_tokens,
                batch.num_prompt_tokens[:count],
            )
            return result

        return _prepare_inputs

    wrap_method(runner, "_update_states", ("scheduler_output",), wrap_states)
    wrap_method(runner, "_prepare_inputs", ("scheduler_output", "num_scheduled_tokens"), wrap_inputs)
