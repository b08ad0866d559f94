"""A single module with steering tensors of its own, owned by no engine."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from trimtab.ops.engine_buffers import SteeringBuffers
from trimtab.ops.site_buffers import PER_TOKEN, buffer_name, has_steering, row_monitor_tensors
from trimtab.sites import HookPoint, Site


def register_steering_buffers(
    module: nn.Module,
    hidden_size: int,
    *,
    max_tokens: int,
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    hook_points: Sequence[HookPoint] = (HookPoint.POST_BLOCK,),
) -> None:
    """Give `module` tensors of its own for `hook_points`: `max_rows` rows (row 0, which is zero, included).

    Registers nothing for `max_rows=0`. `share_token_buffers` then joins the per-token buffers of several modules.
    """
    if max_rows < 0 or max_tokens < 1 or hidden_size < 1:
        raise ValueError(f"max_rows={max_rows}, max_tokens={max_tokens}, hidden_size={hidden_size}: sizes are positive")
    if max_rows == 0:
        return
    sites = [Site(0, hook) for hook in hook_points]
    owner = SteeringBuffers(
        sites, hidden_size=hidden_size, max_rows=max_rows, max_tokens=max_tokens, dtype=dtype, device=device
    )
    for site in sites:
        owner.attach(module, site)


def resize_row_monitor_buffers(modules: Iterable[nn.Module]) -> None:
    """Replace the row monitor's dummies by full-size tensors wherever a module holds them.

    To be called before warm-up, tracing and graph capture: those keep the tensors that they saw.
    """
    for module in modules:
        for hook in HookPoint:
            if not has_steering(module, hook):
                continue
            table = getattr(module, buffer_name("steering_table", hook))
            probes_name = buffer_name("steering_monitor_probe_table", hook)
            if getattr(module, probes_name).shape == table.shape:
                continue
            probes, params = row_monitor_tensors(table)
            module.register_buffer(probes_name, probes, persistent=False)
            module.register_buffer(buffer_name("steering_monitor_row_params", hook), params, persistent=False)


def share_token_buffers(modules: Iterable[nn.Module]) -> None:
    """Make all modules read the per-token buffers of the first one."""
    first: nn.Module | None = None
    for module in modules:
        if not any(has_steering(module, hook) for hook in HookPoint):
            continue
        first = first if first is not None else module
        for name in PER_TOKEN:
            module.register_buffer(name, getattr(first, name), persistent=False)
