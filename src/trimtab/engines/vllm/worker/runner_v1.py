"""Drive the steering runtime from vLLM's V1 model runner (`vllm.v1.worker.gpu_model_runner`).

`_update_states` says who has gone. `_prepare_inputs` runs once per real step, in batch order, before the forward pass
and under the event that guards vLLM's own pinned buffers. Dummy, profile and capture runs call neither, and see the
buffers as the last real step left them: row 0 everywhere until the first request.
"""

from typing import Any

from trimtab.engines.vllm.carried import Decoded, owner_of, steering_of
from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.worker.membership import Membership
from trimtab.runtime import SteeringRuntime


class DriveV1:
    """What the patches of one V1 runner call."""

    def __init__(self, runner: Any, runtime: SteeringRuntime, settings: SteeringSettings, max_requests: int) -> None:
        self.runtime = runtime
        self._runner = runner
        self._settings = settings
        self._members = Membership(runtime, max_requests)
        self._recent = Decoded()

    def before_states(self, scheduler_output: Any) -> None:
        """A step begins: requests have gone."""
        # A set of strings is iterated in another order in each process: sorted, so that ranks free rows alike.
        self._members.leave(sorted(scheduler_output.finished_req_ids))

    def plan(self, num_scheduled_tokens: Any) -> None:
        """The runner's `input_batch` is that of the next pass."""
        batch = self._runner.input_batch
        count = batch.num_reqs
        request_ids = batch.req_ids[:count]
        for request_id in self._members.new(request_ids):
            params = self._runner.requests[request_id].sampling_params
            steering = steering_of(params, self._settings, self._recent)
            self._members.join(request_id, steering, request_ids, owner_of(params, request_id))
        self.runtime.step(
            request_ids,
            batch.num_computed_tokens_cpu[:count],
            num_scheduled_tokens,
            batch.num_prompt_tokens[:count],
        )
