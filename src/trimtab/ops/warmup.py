"""Compiles ahead what service will launch, by launching it: the registered operators, on the real sites' own buffers.

Nothing here builds look-alike tensors: a variant is keyed by strides and alignments, and an imitation that differs in
one of them compiles what no request uses. To be called after `resize_row_monitor_buffers` and before graph capture;
on a machine without CUDA or Triton it does nothing.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.ops.args import SteeringOpArgs
from trimtab.ops.emission import emission
from trimtab.ops.gate_buffers import gate_count, gate_op_args
from trimtab.ops.host import site_state
from trimtab.ops.library import kernels_serve
from trimtab.ops.site_buffers import (
    has_steering,
    monitor_op_args,
    row_monitor_dummies,
    row_monitor_tensors,
    steering_op_args,
)
from trimtab.ops.slot_buffers import slot_form, slot_op_args, steered_dtype
from trimtab.ops.variants import compiled_variants, late_variants, pause, watch
from trimtab.sites import HookPoint

__all__ = [
    "compiled_variants",
    "late_variants",
    "unwarmed_sites",
    "warmed_launches",
    "warmup_apply_gates_kernel",
    "warmup_apply_slots_kernel",
    "warmup_apply_steering_kernel",
    "warmup_steering_monitor_kernel",
]

logger = logging.getLogger(__name__)


def warmup_apply_steering_kernel(
    modules: Iterable[nn.Module],
    sizes: Iterable[int],
    *,
    dtype: torch.dtype | None = None,
    row_monitor: Sequence[bool] | None = None,
    in_place: Sequence[bool] = (False, True),
) -> int:
    """Launch `apply_steering` (and its in-place form) for every site of `modules` at every number of tokens in `sizes`.

    `dtype` is that of the hidden states (default: the site's table); where slots look back they are steered in float32.
    `row_monitor` names the states to warm; by default each site is warmed as it is registered. Buffers keep their
    values. Returns how many variants this compiled; any that appears later is counted by `late_variants`.
    """

    operators = {False: torch.ops.trimtab.apply_steering, True: torch.ops.trimtab.apply_steering_}

    def launches(module: nn.Module, hook: HookPoint, hidden: Tensor) -> int:
        steered = hidden.to(steered_dtype(module, hook, hidden.dtype))
        states = list(_row_monitor_states(steering_op_args(module, hook, steered), row_monitor))
        for args, form in product(states, in_place):
            operators[form](*args)
        return len(states) * len(in_place)

    sites = _served_sites(modules)
    if not sites:
        return 0
    from trimtab.ops.kernels.apply_steering import apply_steering_kernel

    return _warm(apply_steering_kernel, sites, sizes, dtype, launches)


def warmup_steering_monitor_kernel(
    modules: Iterable[nn.Module], sizes: Iterable[int], *, dtype: torch.dtype | None = None
) -> int:
    """Launch `steering_monitor` for every site of `modules` at every number of tokens in `sizes`.

    The per-token buffers that it multiplies keep their values. Returns how many variants this compiled.
    """

    def launches(module: nn.Module, hook: HookPoint, hidden: Tensor) -> int:
        args = monitor_op_args(module, hook, hidden)
        written = (args.steering_token_scales, args.steering_row_gate)
        before = [tensor.clone() for tensor in written]
        torch.ops.trimtab.steering_monitor(*args)
        for tensor, values in zip(written, before, strict=True):
            tensor.copy_(values)
        return 1

    sites = _served_sites(modules)
    if not sites:
        return 0
    from trimtab.ops.seed.steering_monitor import steering_monitor_kernel

    return _warm(steering_monitor_kernel, sites, sizes, dtype, launches)


def warmup_apply_gates_kernel(
    modules: Iterable[nn.Module], sizes: Iterable[int], *, dtype: torch.dtype | None = None
) -> int:
    """Launch `apply_gates_` for every site of `modules` that serves gates: adding and only deciding, with the stream in
    one part and in two.

    Gates' factors keep their values as long as no token on the device has a gate, which is so before service. Returns
    how many variants this compiled.
    """

    def launches(module: nn.Module, hook: HookPoint, hidden: Tensor) -> int:
        added_to = torch.empty_like(hidden, dtype=steered_dtype(module, hook, hidden.dtype))
        forms = list(product((added_to, hidden.new_empty(0, hidden.shape[1])), (None, hidden)))
        for steered, rest in forms:
            torch.ops.trimtab.apply_gates_(*gate_op_args(module, hook, steered, hidden, rest))
        return len(forms)

    sites = [(module, hook) for module, hook in _served_sites(modules) if gate_count(module, hook)]
    if not sites:
        return 0
    from trimtab.ops.kernels.apply_gates import apply_gates_kernel

    return _warm(apply_gates_kernel, sites, sizes, dtype, launches)


def warmup_apply_slots_kernel(
    modules: Iterable[nn.Module], sizes: Iterable[int], *, dtype: torch.dtype | None = None
) -> int:
    """Launch `apply_slots_` for every site of `modules` where slots can act, with the stream in one part and in two.

    Buffers keep their values. Returns how many variants this compiled.
    """

    def launches(module: nn.Module, hook: HookPoint, hidden: Tensor) -> int:
        steered = torch.zeros_like(hidden, dtype=steered_dtype(module, hook, hidden.dtype))
        for rest in (None, hidden):
            torch.ops.trimtab.apply_slots_(*slot_op_args(module, hook, steered, rest, hidden))
        return 2

    sites = [(module, hook) for module, hook in _served_sites(modules) if slot_form(module, hook) is not None]
    if not sites:
        return 0
    from trimtab.ops.kernels.apply_slots import apply_slots_kernel

    return _warm(apply_slots_kernel, sites, sizes, dtype, launches)


def warmed_launches(modules: Iterable[nn.Module]) -> dict[str, int]:
    """How many launches warmed the sites of `modules`, by kernel. Empty where no kernel was: nothing is warm then."""
    total: Counter[str] = Counter()
    for module, hook in _sites(modules):
        total += site_state(module, hook).warmed
    return dict(sorted(total.items()))


def unwarmed_sites(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, HookPoint]]:
    """The (module, hook) pairs whose operator launches a kernel that was not warmed for them."""
    return [
        (module, hook)
        for module, hook in _served_sites(modules)
        if not _kernels_of(module, hook) <= site_state(module, hook).warmed.keys()
    ]


def _kernels_of(module: nn.Module, hook: HookPoint) -> set[str]:
    """The kernels that `emit` may launch at a site."""
    mode, kernels = emission(module), {"apply_steering_kernel"}
    if mode.cross_layer and mode.monitor_at in (None, hook):
        kernels.add("steering_monitor_kernel")
    if gate_count(module, hook):
        kernels.add("apply_gates_kernel")
    if slot_form(module, hook) is not None:
        kernels.add("apply_slots_kernel")
    return kernels


def _sites(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, HookPoint]]:
    return [(module, hook) for module in modules for hook in HookPoint if has_steering(module, hook)]


def _served_sites(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, HookPoint]]:
    """The (module, hook) pairs whose operator launches a kernel."""
    return [
        (module, hook) for module, hook in _sites(modules) if _launches_kernels(steering_op_args(module, hook, _NONE))
    ]


_NONE = torch.empty(0, 0)


def _launches_kernels(args: SteeringOpArgs) -> bool:
    return args.steering_table.is_cuda and kernels_serve(args.steering_table)


def _row_monitor_states(args: SteeringOpArgs, states: Sequence[bool] | None) -> Iterable[SteeringOpArgs]:
    """`args` as registered, or once per state with the tensors that registration or resizing gives a site in it."""
    for state in [args.has_row_monitor] if states is None else states:
        if state == args.has_row_monitor:
            yield args
            continue
        table = args.steering_table
        probes, params = row_monitor_tensors(table) if state else row_monitor_dummies(table.device)
        yield args._replace(steering_monitor_probe_table=probes, steering_monitor_row_params=params)


def _warm(
    kernel: Any,
    sites: list[tuple[nn.Module, HookPoint]],
    sizes: Iterable[int],
    dtype: torch.dtype | None,
    launches: Callable[[nn.Module, HookPoint, Tensor], int],
) -> int:
    started, before = time.perf_counter(), compiled_variants(kernel)
    pause(kernel)
    tokens = sorted({size for size in sizes if size > 0})
    with torch.no_grad():
        for module, hook in sites:
            table = steering_op_args(module, hook, _NONE).steering_table
            hidden = torch.zeros(
                max(tokens, default=0), table.shape[1], dtype=dtype or table.dtype, device=table.device
            )
            warmed = site_state(module, hook).warmed
            for size in tokens:
                warmed[kernel.__name__] += launches(module, hook, hidden[:size])
            if hidden.is_cuda:
                torch.cuda.synchronize(hidden.device)
    watch(kernel)
    compiled = compiled_variants(kernel) - before
    logger.info(
        "%s: %d sites at %s tokens in %.0f ms: %d variants compiled, %d held",
        kernel.__name__, len(sites), tokens, 1e3 * (time.perf_counter() - started), compiled, before + compiled,
    )  # fmt: skip
    return compiled
