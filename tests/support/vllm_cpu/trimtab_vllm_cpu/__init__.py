"""Runs stock vLLM on a machine without a GPU, for tests.

vLLM's published wheel is built for CUDA. This platform plugin keeps vLLM's own CPU platform, worker, model runners and
attention backend, and supplies in PyTorch the handful of compiled operators that only its CPU build has. vLLM itself
is not edited.

Model runner V1 works as it is. V2 needs `triton` installed and, in the environment *before Python starts* (Triton
decorates its helpers at import):

    TRITON_INTERPRET=1          interpret the Triton kernels on CPU tensors
    CUDA_VISIBLE_DEVICES=       (empty) lets vLLM accept Triton without a GPU

`TRIMTAB_VLLM_CPU=0` turns the platform off.
"""

import os


def register() -> str | None:
    """Name the platform class, or decline where there is a GPU; vLLM calls this in each of its processes."""
    if os.environ.get("TRIMTAB_VLLM_CPU", "1") == "0":
        return None
    import torch  # late: vLLM imports this module only to find the function

    return None if torch.cuda.is_available() else "trimtab_vllm_cpu.platform.TorchKernelsCpuPlatform"
