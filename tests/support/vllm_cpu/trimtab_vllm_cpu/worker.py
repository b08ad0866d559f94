"""vLLM's CPU worker with kernels written in PyTorch, profiling once more where pipeline stages need it."""

import gc
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from trimtab_vllm_cpu.kernels import replace_kernels


class TorchKernelsCpuWorker(CPUWorker):
    """Replaces kernels in its process, and adds the profile run that vLLM's CPU worker skips in eager mode."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An engine's start collects garbage ten times, half a second each over all that was ever imported.
        gc.collect()
        gc.freeze()
        super().__init__(*args, **kwargs)
        replace_kernels()

    def determine_available_memory(self) -> int:
        runner = self.model_runner
        # The V1 runner allocates the receive buffers of pipeline stages > 0 in its profile run.
        if getattr(runner, "intermediate_tensors", 0) is None and self.parallel_config.pipeline_parallel_size > 1:
            runner.profile_run()
        return int(super().determine_available_memory())
