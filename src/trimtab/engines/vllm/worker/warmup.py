"""Compile the operator's kernels for the sizes that a worker will capture and serve, before it captures any graph.

Where the model is compiled by vLLM the addition is part of its graphs and the operator is not launched, but not every
model is compiled, and the kernels take a second. On a CPU there are none and this does nothing.
"""

from typing import Any

import torch

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.errors import SteeringError
from trimtab.ops.warmup import (
    unwarmed_sites,
    warmup_apply_gates_kernel,
    warmup_apply_slots_kernel,
    warmup_apply_steering_kernel,
)


def warm_up_kernels(vllm_config: Any, attachment: Attachment) -> None:
    """Launch the operator at every site; every variant that appears later is counted as late."""
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or ()
    longest = int(vllm_config.scheduler_config.max_num_batched_tokens)
    sizes = {1, 2, 16, 17, longest, *captured}  # a variant is keyed by whether N is 1, a multiple of 16, or neither
    modules = list(dict.fromkeys(attachment.modules.values()))
    warmup_apply_steering_kernel(modules, sizes)
    monitored = {attachment.modules[site]: None for site in attachment.buffers.row_monitor_sites}
    # A stream in two parts is given to the row monitor as their sum, which is not rounded.
    warmup_apply_steering_kernel(monitored, sizes, dtype=torch.float32, in_place=(False,))
    warmup_apply_gates_kernel(modules, sizes)
    warmup_apply_slots_kernel(modules, sizes)


def require_warm(attachment: Attachment) -> None:
    """Raise `SteeringError` where a site's operator would launch a kernel that was not warmed for it."""
    cold = set(unwarmed_sites(dict.fromkeys(attachment.modules.values())))
    if sites := [str(site) for site, module in attachment.modules.items() if (module, site.hook) in cold]:
        raise SteeringError(
            "steering",
            f"the kernels of {', '.join(sites)} were not warmed: requests would wait while they are compiled. This is "
            "a fault of trimtab with this version of vLLM; please report it",
        )
