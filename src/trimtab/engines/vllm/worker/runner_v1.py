"""Drive the steering runtime from vLLM's V1 model runner (`vllm.v1.worker.gpu_model_runner`).

`_update_states` says who has gone. `_prepare_inputs` runs once per real step, in batch order, before the forward pass
and under the event that guards vLLM's own pinned buffers. Dummy, profile and capture runs call neither, and see the
buffers as the last real step left them: row 0 everywhere until the first request.

The device's positions and token ids are those of the pass when `_prepare_inputs` returns; the host's are not while a
step is under way whose drafts may be rejected, or whose tokens are only on the device.
"""

from functools import partial
from typing import Any

from trimtab.engines.vllm.carried import Decoded, owner_of, steering_of
from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.worker.membership import History, Membership
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

    def plan(self, scheduler_output: Any, num_scheduled_tokens: Any) -> None:
        """The runner's `input_batch` is that of the next pass, which `scheduler_output` asked for."""
        batch = self._runner.input_batch
        count, tokens = batch.num_reqs, int(num_scheduled_tokens.sum())
        request_ids = batch.req_ids[:count]
        self._follow(scheduler_output)
        for request_id in self._members.new(request_ids):
            params = self._runner.requests[request_id].sampling_params
            steering = steering_of(params, self._settings, self._recent)
            history = partial(self._history, request_id, scheduler_output)
            self._members.join(request_id, steering, request_ids, owner_of(params, request_id), history)
        self.runtime.step(
            request_ids,
            batch.num_computed_tokens_cpu[:count],
            num_scheduled_tokens,
            batch.num_prompt_tokens[:count],
            positions=self._runner.positions[:tokens],
            token_ids=self._runner.input_ids.gpu[:tokens],
        )

    def _follow(self, scheduler_output: Any) -> None:
        """Tell of members that come back from preemption, which they outlast here, or begin again further back."""
        batch = self._runner.input_batch
        for request_id in list(self._members.followed):
            if (index := batch.req_id_to_index.get(request_id)) is not None:
                upto = int(batch.num_computed_tokens_cpu[index])
                resumed = request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids
                known = self._history(request_id, scheduler_output).tokens if resumed else None
                self._members.fall_back(request_id, upto, known)

    def _history(self, request_id: str, scheduler_output: Any) -> History:
        """What is known of a request of the batch. Of one that comes back the scheduler says all of its tokens: with
        asynchronous scheduling the runner itself does not know those of the answer."""
        batch, request = self._runner.input_batch, self._runner.requests[request_id]
        upto = int(batch.num_computed_tokens_cpu[batch.req_id_to_index[request_id]])
        tokens = scheduler_output.scheduled_cached_reqs.all_token_ids.get(request_id)
        if tokens is None:
            tokens = [*(request.prompt_token_ids or ()), *request.output_token_ids]  # none for embeddings
        return History(tokens, upto)
