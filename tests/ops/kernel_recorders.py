"""Lets operators on CPU tensors launch kernels, and notes the variants that Triton would compile."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from ops_triton import RecordedKernel, recorded

from trimtab.ops import library, warmup
from trimtab.ops.kernels import apply_gates, apply_slots, apply_steering
from trimtab.ops.seed import steering_monitor


@dataclass
class Recorders:
    apply: RecordedKernel
    monitor: RecordedKernel
    gates: RecordedKernel
    slots: RecordedKernel

    @property
    def keys(self) -> list[set[str]]:
        return [self.apply.keys, self.monitor.keys, self.gates.keys, self.slots.keys]


@contextmanager
def recorded_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorders]:
    """Exchanges the operators' CPU implementations for those that launch kernels, and the kernels for recorders."""
    monkeypatch.setattr(warmup, "_launches_kernels", lambda args: True)
    implementations = torch.library.Library(library.NAMESPACE, "IMPL")
    for name, launches in {
        "apply_steering": library._apply_cuda,
        "apply_steering_": library._apply_in_place_cuda,
        "steering_monitor": library._monitor_cuda,
        "apply_gates_": library._gates_cuda,
        "apply_slots_": library._slots_cuda,
    }.items():
        implementations.impl(name, launches, "CPU", allow_override=True)
    with (
        recorded(apply_steering, "apply_steering_kernel") as apply,
        recorded(steering_monitor, "steering_monitor_kernel") as monitor,
        recorded(apply_gates, "apply_gates_kernel") as gates,
        recorded(apply_slots, "apply_slots_kernel") as slots,
    ):
        yield Recorders(apply, monitor, gates, slots)
    implementations._destroy()
