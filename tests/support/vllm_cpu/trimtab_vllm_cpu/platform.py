"""vLLM's CPU platform with kernels written in PyTorch, kept as close as possible to what runs on a GPU."""

import os
from functools import cache
from typing import Any

from vllm.platforms.cpu import CpuPlatform

from trimtab_vllm_cpu.kernels import register_kernels


class TorchKernelsCpuPlatform(CpuPlatform):
    """Compiles and schedules as asked for, where vLLM's CPU platform would quietly choose something simpler."""

    # Small torch.compile'd helpers (log-probabilities, the TP embedding mask) would cost 10 s of g++ each. The model
    # itself still goes through Inductor.
    simple_compile_backend = "eager"

    @classmethod
    def get_compile_backend(cls) -> str:
        return "inductor"

    @classmethod
    def import_kernels(cls) -> None:
        register_kernels()

    @classmethod
    @cache  # once per process: it goes through every name of every module
    def register_triton_kernel_overrides(cls) -> None:
        getattr(super(), "register_triton_kernel_overrides", lambda: None)()  # 0.26 has none

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        super().pre_register_and_update(parser)
        from vllm.model_executor.models import registry

        # vLLM looks into a model's class in a new interpreter, 10 s of imports, to keep CUDA out of this process.
        registry._run_in_subprocess = lambda look: look()

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        # CpuPlatform turns VLLM_COMPILE into DYNAMO_TRACE_ONCE and async scheduling off, and starts worker processes
        # from new interpreters, 8 s of imports each; keep what was asked for.
        start_method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # vLLM's own default elsewhere
        compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
        mode, backend, async_scheduling = compilation.mode, compilation.backend, scheduler.async_scheduling
        super().check_and_update_config(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method
        if vllm_config.lora_config is None:
            compilation.mode, compilation.backend = mode, backend or compilation.backend
            # These fusion passes exist on CUDA only.
            compilation.pass_config.fuse_norm_quant = compilation.pass_config.fuse_act_quant = False
            if compilation.compile_sizes is None:  # set on platforms with CUDA graphs only
                compilation.compile_sizes = []
            scheduler.async_scheduling = async_scheduling
        if vllm_config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
            vllm_config.parallel_config.worker_cls = "trimtab_vllm_cpu.worker.TorchKernelsCpuWorker"
