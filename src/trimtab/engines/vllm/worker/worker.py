"""A steered worker: its model attached, its runner driving the runtime, its start-up checked, its state reported."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.settings.refusals import require_steerable
from trimtab.engines.vllm.settings.stamp import stamped_settings
from trimtab.engines.vllm.worker.attach import Attachment, attach
from trimtab.engines.vllm.worker.row_sizes import require_full_size
from trimtab.engines.vllm.worker.runner_v1 import DriveV1
from trimtab.engines.vllm.worker.runner_v2 import DriveV2
from trimtab.engines.vllm.worker.single_runs import require_single_runs
from trimtab.engines.vllm.worker.slot_check import require_live_slots
from trimtab.engines.vllm.worker.startup_check import require_live_sites
from trimtab.engines.vllm.worker.warmup import require_warm, warm_up_kernels
from trimtab.errors import SteeringError
from trimtab.ops.warmup import late_variants, warmed_launches
from trimtab.runtime import SteeringRuntime

logger = logging.getLogger("vllm.trimtab")


@dataclass(frozen=True)
class WorkerSteering:
    """What trimtab keeps on a worker. There is no runtime, and nothing that drives it, on a pipeline stage without a
    steered layer."""

    settings: SteeringSettings
    attachment: Attachment
    runtime: SteeringRuntime | None
    drive: DriveV1 | DriveV2 | None


def attach_worker(worker: Any) -> WorkerSteering:
    """Steer the model that the `worker` of a steered engine has just loaded.

    Raises `SteeringError` where this model or this runner cannot be steered as configured.
    """
    settings = stamped_settings(worker.vllm_config)
    require_steerable(worker.vllm_config)
    runner = worker.model_runner
    attachment = attach(runner.get_model(), worker.vllm_config, settings, worker.device)
    runtime, drive = None, None
    if attachment.modules:
        limit = int(worker.vllm_config.scheduler_config.max_num_seqs)
        runtime = SteeringRuntime(attachment.buffers, max_requests=limit, lowers=settings.row_monitor)
        drive = (DriveV2 if is_v2(runner) else DriveV1)(runner, runtime, settings, limit)
    steering = worker._trimtab = WorkerSteering(settings, attachment, runtime, drive)
    logger.info(
        "Steering %d sites: %.1f MiB for %d rows, %.1f MiB of it for probes of rows",
        len(attachment.modules),
        attachment.buffers.nbytes / 2**20,
        attachment.buffers.table.shape[1],
        (attachment.buffers.row_probes.nbytes + attachment.buffers.row_params.nbytes) / 2**20,
    )
    return steering


def worker_status(worker: Any, digest: bool = True, answers: Sequence[str] = ()) -> dict[str, Any]:
    """What is on, in plain values, and what gates and slots did for the accounts `answers`. Waits for the current
    step. Digests of ranks that saw the same requests are equal; one costs a pass over the state.

    Never raises: where one worker of several fails, vLLM leaves the replies of the others unread, and takes them for
    those to its next call. What went wrong is in `error`.
    """
    try:
        return _status(worker, digest, answers)
    except Exception as error:
        logger.exception("cannot say what steering does")
        return {"rank": int(getattr(worker, "rank", -1)), "error": f"{type(error).__name__}: {error}"}


def _status(worker: Any, digest: bool, answers: Sequence[str]) -> dict[str, Any]:
    steering = _steering(worker)
    runtime, gates, slots = steering.runtime, steering.attachment.buffers.gates, steering.attachment.buffers.slots
    warmed = warmed_launches(steering.attachment.modules.values())  # by kernel; none where the device runs no kernels
    status = {
        "rank": int(worker.rank),
        "runner": "v2" if is_v2(worker.model_runner) else "v1",
        "sites": [str(site) for site in steering.attachment.buffers.sites],
        "row_monitor_sites": [str(site) for site in steering.attachment.buffers.row_monitor_sites],
        "rows_in_use": runtime.rows_in_use if runtime else 0,
        "capacity": runtime.capacity if runtime else 0,
        "row_uploads": runtime.row_uploads if runtime else 0,
        "nbytes": steering.attachment.buffers.nbytes,
        "warmed": warmed,
        "warmed_launches": sum(warmed.values()),
        "late_variants": late_variants(),
        "gates": [asdict(use) for use in runtime.gate_totals()] if runtime else [],
        "probe_sites": [str(site) for site in gates.probe_sites] if gates else [],
        "slot_sites": [str(site) for site in slots.sites] if slots else [],
        "slot_uses": {name: [asdict(use) for use in runtime.slot_report(name)] for name in answers} if runtime else {},
        "uses": {name: [asdict(use) for use in runtime.gate_report(name)] for name in answers} if runtime else {},
    }
    return status | {"digest": runtime.digest() if runtime else ""} if digest else status


def _steering(worker: Any) -> WorkerSteering:
    steering: WorkerSteering | None = getattr(worker, "_trimtab", None)
    if steering is None:
        raise SteeringError("steering", "this engine was started without it: set `steering` in additional_config")
    return steering


def is_v2(runner: Any) -> bool:
    """Whether a runner is of the V2 family: by what it is, not by what was asked for."""
    return any(base.__module__ == "vllm.v1.worker.gpu.model_runner" for base in type(runner).__mro__)


def before_warm_up(worker: Any) -> None:
    """Before the worker's own warm-up and graph capture, which row 0 leaves unsteered: warm our kernels."""
    steering = _steering(worker)
    warm_up_kernels(worker.vllm_config, steering.attachment)
    if steering.runtime is not None:
        steering.runtime.warm_up()  # both runners keep positions as int64 and ids as int32
    require_warm(steering.attachment)


def after_warm_up(worker: Any) -> None:
    """See that the model that will serve is steered, once, and at full size. Raises `SteeringError` if it is not."""
    steering = _steering(worker)
    require_single_runs(worker, steering.attachment, is_v2(worker.model_runner))
    require_live_sites(worker, steering.attachment, is_v2(worker.model_runner))
    require_live_slots(worker, steering.attachment, is_v2(worker.model_runner))
    require_full_size(worker, steering.attachment, is_v2(worker.model_runner))


def unmeasured_bytes(steering: WorkerSteering) -> int:
    """Bytes of the tables that vLLM's KV-cache sizing would not know of; newer versions measure what is gone from the
    device."""
    from vllm.utils import mem_utils

    measured = "total_consumed" in getattr(mem_utils.MemoryProfilingResult, "__dataclass_fields__", {})
    return 0 if measured else steering.attachment.buffers.nbytes
