"""Drive the steering runtime from vLLM's V2 model runner (`vllm.v1.worker.gpu.model_runner`).

Requests come and go through `add_requests` and `_remove_request`, preempted ones too. `prepare_inputs` runs once per
real step; its arguments change from version to version, so only the `InputBatch` that it returns is used, whose token
ids and positions, on the device, are those of the pass. Dummy, profile and capture runs build their batches elsewhere.
"""

from dataclasses import fields
from functools import partial
from typing import Any

from trimtab.engines.vllm.carried import Decoded, owner_of, steering_of
from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.worker.membership import History, Membership
from trimtab.errors import SteeringError
from trimtab.runtime import SteeringRuntime

_BATCH_FIELDS = {
    "req_ids",
    "idx_mapping_np",
    "num_computed_tokens_np",
    "num_scheduled_tokens",
    "num_tokens_after_padding",
    "input_ids",
    "positions",
}


class DriveV2:
    """What the patches of one V2 runner call. Raises `SteeringError` where its batches are not as expected."""

    def __init__(self, runner: Any, runtime: SteeringRuntime, settings: SteeringSettings, max_requests: int) -> None:
        if (fault := batch_fault()) is not None:
            raise SteeringError("steering", f"trimtab does not know this vLLM: {fault}")
        self.runtime = runtime
        self._runner = runner
        self._settings = settings
        self._members = Membership(runtime, max_requests)
        self._recent = Decoded()

    def before_removal(self, request_id: str) -> None:
        """A request leaves."""
        self._members.leave_soon(request_id)

    def added(self, scheduler_output: Any) -> None:
        """New requests have come."""
        self._members.settle()  # an engine that falls idle tells who has finished, and prepares no further step
        for new in scheduler_output.scheduled_new_reqs:
            steering = steering_of(new.sampling_params, self._settings, self._recent)
            owner = owner_of(new.sampling_params, new.req_id)
            # Of one that comes back from preemption the answer so far counts among the tokens that are prefilled.
            history = partial(History, new.prefill_token_ids, new.num_computed_tokens)
            self._members.join(new.req_id, steering, scheduler_output.num_scheduled_tokens, owner, history)

    def plan(self, batch: Any) -> None:
        """`batch` is that of the next pass."""
        self._members.settle()
        self.runtime.step(
            batch.req_ids,
            batch.num_computed_tokens_np,
            batch.num_scheduled_tokens,
            # A prompt's own length. A request that comes back from preemption prefills its answer so far as well.
            self._runner.req_states.prompt_len.np[batch.idx_mapping_np],
            padded_tokens=batch.num_tokens_after_padding,
            positions=batch.positions,
            token_ids=batch.input_ids,
        )


def batch_fault() -> str | None:
    """What this vLLM's `InputBatch` lacks; None if nothing. Raises `ImportError` where there is none."""
    from vllm.v1.worker.gpu.input_batch import InputBatch

    missing = _BATCH_FIELDS - {field.name for field in fields(InputBatch)}
    return f"InputBatch lacks {', '.join(sorted(missing))}" if missing else None
