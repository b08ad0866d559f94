"""vLLM's CPU platform with kernels written in PyTorch, kept as close as possible to what runs on a GPU."""

from typing import Any

from vllm.platforms.cpu import CpuPlatform

from trimtab_vllm_cpu.kernels import register_kernels, slot_mapping_kernel


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
    def register_triton_kernel_overrides(cls) -> None:
        super().register_triton_kernel_overrides()
        import vllm.model_executor.layers.utils as layer_utils
        from vllm.triton_utils import HAS_TRITON, dispatcher

        layer_utils.check_cpu_sgl_kernel = lambda *_: False  # a compiled bfloat16 GEMM that this wheel lacks
        if HAS_TRITON:  # interpreted; this one kernel does not run under the interpreter
            from vllm.v1.sample.ops import topk_topp_sampler

            topk_topp_sampler.HAS_TRITON = False
        else:
            dispatcher.register_kernels(
                {"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": slot_mapping_kernel}
            )

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        # CpuPlatform turns VLLM_COMPILE into DYNAMO_TRACE_ONCE and async scheduling off; keep what was asked for.
        compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
        mode, backend, async_scheduling = compilation.mode, compilation.backend, scheduler.async_scheduling
        super().check_and_update_config(vllm_config)
        if vllm_config.lora_config is None:
            compilation.mode, compilation.backend = mode, backend or compilation.backend
            # These fusion passes exist on CUDA only.
            compilation.pass_config.fuse_norm_quant = compilation.pass_config.fuse_act_quant = False
            if compilation.compile_sizes is None:  # set on platforms with CUDA graphs only
                compilation.compile_sizes = []
            scheduler.async_scheduling = async_scheduling
        if vllm_config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
            vllm_config.parallel_config.worker_cls = "trimtab_vllm_cpu.worker.TorchKernelsCpuWorker"
