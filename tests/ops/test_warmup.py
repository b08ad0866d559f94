"""Warm-up where there is nothing to compile, and the reading of Triton's caches."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trimtab.ops import register_steering_buffers, warmup
from trimtab.ops.buffers import monitor_op_args
from trimtab.ops.variants import compiled_variants
from trimtab.ops.warmup import warmup_apply_steering_kernel, warmup_steering_monitor_kernel
from trimtab.sites import HookPoint


def test_warm_up_does_nothing_on_a_cpu() -> None:
    module = nn.Module()
    register_steering_buffers(module, 8, max_tokens=4, max_rows=3, dtype=torch.float32)
    assert warmup_apply_steering_kernel([module], [1, 2]) == 0
    assert warmup_steering_monitor_kernel([module], [1, 2]) == 0


def test_warm_up_leaves_every_buffer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the operators run on the CPU: what matters is what warm-up does around them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(warmup, "_launches_kernels", lambda args: True)
    module, other = nn.Module(), nn.Module()
    for one in (module, other):
        register_steering_buffers(one, 8, max_tokens=4, max_rows=3, dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        for buffer in one.buffers():
            if buffer.dtype == torch.float32:
                buffer.copy_(torch.rand(buffer.shape, generator=generator))
            elif buffer.dtype == torch.bool:
                buffer.fill_(True)
            else:
                buffer.fill_(1)
    warmup_apply_steering_kernel([module], [1, 4])
    warmup_steering_monitor_kernel([module], [1, 4])
    args = monitor_op_args(other, HookPoint.POST_BLOCK, torch.zeros(4, 8))
    before = args.steering_row_gate.clone(), args.steering_token_scales.clone()
    torch.ops.trimtab.steering_monitor(*args)
    for changed, was in zip((args.steering_row_gate, args.steering_token_scales), before, strict=True):
        assert (changed != was).any()  # so there was something to put back
        changed.copy_(was)
    for (name, mine), theirs in zip(module.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_operators_and_warm_up_work_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None  # importing it now raises
import torch
from trimtab.ops import emit, register_steering_buffers
from trimtab.ops.warmup import warmup_apply_steering_kernel, warmup_steering_monitor_kernel
from trimtab.sites import HookPoint
module = torch.nn.Module()
register_steering_buffers(module, 8, max_tokens=4, max_rows=3, dtype=torch.float32)
warmup_apply_steering_kernel([module], [1]), warmup_steering_monitor_kernel([module], [1])
print(emit(module, HookPoint.POST_BLOCK, torch.ones(2, 8)).sum().item())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout.strip(), run.returncode) == ("16.0", 0), run.stderr


def test_variants_are_counted_in_both_layouts_of_tritons_cache() -> None:
    newer = SimpleNamespace(device_caches={0: ({"a": 1, "b": 2}, {}, "target"), 1: ({"a": 1}, {}, "target")})
    older = SimpleNamespace(cache={0: {"a": 1}, 1: {"a": 1, "c": 2}})
    assert compiled_variants(newer) == 3
    assert compiled_variants(older) == 3


def test_an_unknown_cache_is_an_error_and_not_a_count_of_zero() -> None:
    with pytest.raises(RuntimeError, match="neither `device_caches` nor `cache`"):
        compiled_variants(SimpleNamespace())


def test_the_installed_triton_keeps_its_variants_where_we_look() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from trimtab.ops.kernels.apply_steering import apply_steering_kernel

    assert compiled_variants(apply_steering_kernel) == 0
