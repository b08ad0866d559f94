"""Warm-up compiles exactly what service launches: the keys of both, computed by Triton's own binder without a GPU.

The operators' CPU implementation is exchanged for the one that launches kernels, and the kernels for recorders, so both
sides go through the registered operator, the real buffers and the real launch.
"""

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from kernel_recorders import Recorders

from trimtab.ops import (
    Emission,
    SteeringBuffers,
    emit,
    register_steering_buffers,
    resize_row_monitor_buffers,
    set_emission,
    share_token_buffers,
    warmup,
)
from trimtab.sites import HookPoint, Site

POST = HookPoint.POST_BLOCK
SIZES = [1, 2, 15, 16, 17, 256, 8192]
WIDTH = 64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

APPLY_VARIANTS = 2  # out of place and in place; neither the number of tokens nor the site selects one
MONITOR_VARIANTS = 1


def engine(dtype: torch.dtype, *, row_monitor: bool, cross_layer: bool, slab: bool) -> list[nn.Module]:
    """Three steered layers as an engine makes them: views of one owner, or registered one by one and then joined."""
    layers = [nn.Module() for _ in range(3)]
    if slab:
        sites = [Site(number, POST) for number in range(3)]
        owner = SteeringBuffers(sites, hidden_size=WIDTH, max_rows=5, max_tokens=max(SIZES), dtype=dtype)
        for layer, site in zip(layers, sites, strict=True):
            owner.attach(layer, site)
    else:
        for layer in layers:
            register_steering_buffers(layer, WIDTH, max_tokens=max(SIZES), max_rows=5, dtype=dtype)
        share_token_buffers(layers)
    for layer in layers:
        set_emission(layer, Emission(cross_layer=cross_layer))
    if row_monitor:
        resize_row_monitor_buffers(layers)
    return layers


def warm(layers: list[nn.Module]) -> None:
    warmup.warmup_apply_steering_kernel(layers, SIZES)
    warmup.warmup_steering_monitor_kernel(layers, SIZES)


def serve(layers: list[nn.Module], dtype: torch.dtype) -> None:
    """Every size, at every layer, through the call that engines make; hidden states as a model lays them out."""
    stream = torch.zeros(max(SIZES), WIDTH, dtype=dtype)
    for tokens in SIZES:
        for layer in layers:
            for in_place in (False, True):
                emit(layer, POST, torch.zeros(tokens, WIDTH, dtype=dtype), in_place=in_place)
                emit(layer, POST, stream[-tokens:], in_place=in_place)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_monitor", [False, True])
@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("slab", [False, True])
def test_service_launches_no_variant_that_warm_up_did_not(
    kernels: Recorders, dtype: torch.dtype, row_monitor: bool, cross_layer: bool, slab: bool
) -> None:
    layers = engine(dtype, row_monitor=row_monitor, cross_layer=cross_layer, slab=slab)
    warm(layers)
    apply_keys, monitor_keys = kernels.apply.keys, kernels.monitor.keys
    assert len(apply_keys) == APPLY_VARIANTS
    assert len(monitor_keys) == MONITOR_VARIANTS
    warm(layers)
    serve(layers, dtype)
    assert kernels.apply.keys == apply_keys
    assert kernels.monitor.keys == monitor_keys
    assert len(kernels.apply.launches) >= 2 * len(SIZES) * len(layers)


def test_warm_up_compares_as_different_what_a_look_alike_buffer_would_compile(kernels: Recorders) -> None:
    """The fault that this file exists for: warm-up with a full-size probe table, service with the dummy."""
    layers = engine(torch.bfloat16, row_monitor=False, cross_layer=False, slab=False)
    warmup.warmup_apply_steering_kernel(layers, SIZES, row_monitor=[True])
    warmed = kernels.apply.keys
    serve(layers, torch.bfloat16)
    assert not kernels.apply.keys <= warmed


def test_a_buffer_registered_with_another_layout_is_noticed(kernels: Recorders) -> None:
    layers = engine(torch.bfloat16, row_monitor=False, cross_layer=False, slab=False)
    warm(layers)
    warmed = kernels.apply.keys
    strided = torch.zeros(WIDTH, 2)[:, 0]
    layers[1].register_buffer("steering_table_post_block_monitor_probe", strided, persistent=False)
    serve(layers, torch.bfloat16)
    assert not kernels.apply.keys <= warmed


def test_both_states_of_the_row_monitor_can_be_warmed_at_once(kernels: Recorders) -> None:
    layers = engine(torch.bfloat16, row_monitor=False, cross_layer=False, slab=True)
    warmup.warmup_apply_steering_kernel(layers, SIZES, row_monitor=[False, True])
    warmed = kernels.apply.keys
    assert len(warmed) == 2 * APPLY_VARIANTS
    resize_row_monitor_buffers(layers)
    serve(layers, torch.bfloat16)
    assert kernels.apply.keys == warmed


def test_a_late_variant_is_counted_and_logged_with_its_key(
    kernels: Recorders, caplog: pytest.LogCaptureFixture
) -> None:
    layers = engine(torch.bfloat16, row_monitor=False, cross_layer=False, slab=True)
    warm(layers)
    serve(layers, torch.bfloat16)
    before = warmup.late_variants()
    assert not caplog.records
    serve(layers, torch.float16)
    assert warmup.late_variants() - before == APPLY_VARIANTS
    assert len(caplog.records) == APPLY_VARIANTS
    assert "apply_steering_kernel was compiled after warm-up" in caplog.text
    assert "*fp16" in caplog.text


def test_warm_up_keeps_what_the_buffers_hold(kernels: Recorders) -> None:
    layers = engine(torch.bfloat16, row_monitor=True, cross_layer=True, slab=True)
    for layer in layers:
        for buffer in layer.buffers():
            buffer.copy_(torch.rand(buffer.shape) > 0.5)
    before = [buffer.clone() for layer in layers for buffer in layer.buffers()]
    warm(layers)
    assert all(torch.equal(a, b) for a, b in zip(before, (b for m in layers for b in m.buffers()), strict=True))
