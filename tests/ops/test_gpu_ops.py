"""The operators on a GPU: numbers, variants, CUDA graphs, and the agreement of the three backends.

Needs torch, triton, numpy and pytest only. Tolerances: `ops_oracle.TOLERANCE`, one rounding to the model dtype plus the
float32 error of sum and gates; they hold for every backend, because each rounds once.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ops_cases import monitor_case, steering_case
from ops_oracle import assert_steered, monitored, numpy64
from torch import Tensor, nn

from trimtab.ops import (
    Emission,
    SteeringBuffers,
    Terms,
    emit,
    reference,
    register_steering_buffers,
    resize_row_monitor_buffers,
    set_emission,
    share_token_buffers,
)
from trimtab.ops.args import SteeringOpArgs
from trimtab.ops.warmup import (
    compiled_variants,
    late_variants,
    warmup_apply_steering_kernel,
    warmup_steering_monitor_kernel,
)
from trimtab.sites import HookPoint, Site

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
POST = HookPoint.POST_BLOCK
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 15, 16, 17, 256, 8192]
WIDTHS = [1, 3, 100, 2048, 2880, 4096, 5376, 8192, 16384, 16400]  # the last takes the reference
DTYPES_AND_WIDTHS = [(torch.bfloat16, width) for width in WIDTHS] + [
    (dtype, width) for dtype in (torch.float32, torch.float16) for width in (3, 100, 4096)
]
FLAGS = list(itertools.product([False, True], repeat=4))  # monitor, gate_rows, row_monitor, tier


def gpu_case(tokens: int, width: int, **settings: object) -> SteeringOpArgs:
    return steering_case(tokens, width, device="cuda", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "width"), DTYPES_AND_WIDTHS)
def test_operator_and_in_place_form_equal_the_oracle(dtype: torch.dtype, width: int) -> None:
    for number, (monitor, gate_rows, row_monitor, tier) in enumerate(FLAGS):
        args = gpu_case(
            (1, 5, 17)[number % 3], width, capacity=20, dtype=dtype, monitor=monitor, gate_rows=gate_rows,
            row_monitor=row_monitor, tier=tier, seed=number,
        )  # fmt: skip
        before = args.hidden_states.clone()
        out = torch.ops.trimtab.apply_steering(*args)
        assert_steered(out, args)
        assert torch.equal(args.hidden_states, before)
        torch.ops.trimtab.apply_steering_(*args)
        assert_steered(args.hidden_states, args._replace(hidden_states=before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_every_pair_of_dtypes(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    args = gpu_case(5, 100, dtype=dtype, table_dtype=table_dtype, monitor=True, gate_rows=True, row_monitor=True)
    assert_steered(torch.ops.trimtab.apply_steering(*args), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_per_program_equal_the_reference(dtype: torch.dtype) -> None:
    args = gpu_case(9001, 256, rows=40, dtype=dtype, monitor=True, gate_rows=True, row_monitor=True)
    expected = reference.apply_steering(args._replace(hidden_states=args.hidden_states.double().float()))
    out = torch.ops.trimtab.apply_steering(*args)
    torch.testing.assert_close(out.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_idle_site_copies_bit_for_bit_and_never_reads_its_table(in_place: bool) -> None:
    args = gpu_case(33, 100, dtype=torch.bfloat16, active=False, monitor=True, row_monitor=True)
    args.steering_table.fill_(torch.nan)
    args.hidden_states[0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    before = args.hidden_states.clone()
    if in_place:
        torch.ops.trimtab.apply_steering_(*args)
        out = args.hidden_states
    else:
        out = torch.ops.trimtab.apply_steering(*args)
        assert out.data_ptr() != before.data_ptr()
    assert torch.equal(out.view(torch.int16), before.view(torch.int16))


def test_strided_inputs_garbage_beyond_the_tokens_and_no_tokens() -> None:
    args = gpu_case(6, 100, capacity=9, monitor=True, gate_rows=True, row_monitor=True)
    args.steering_index[6:] = 10**12
    strided = torch.zeros(100, 12, device="cuda").t()[::2]
    strided.copy_(args.hidden_states)
    slab = torch.zeros(9, 3, device="cuda")
    slab[:, 1] = args.steering_row_gate
    args = args._replace(hidden_states=strided, steering_row_gate=slab[:, 1])
    assert_steered(torch.ops.trimtab.apply_steering(*args), args)
    expected = args._replace(hidden_states=strided.clone())
    torch.ops.trimtab.apply_steering_(*args)
    assert_steered(strided, expected)
    empty = gpu_case(0, 100, capacity=3)
    assert torch.ops.trimtab.apply_steering(*empty).shape == (0, 100)


def test_short_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold, sharpness and gate_rows, got 2"):
        torch.ops.trimtab.apply_steering(*gpu_case(2, 4)._replace(steering_monitor_params=torch.zeros(2).cuda()))
    with pytest.raises(ValueError, match="threshold, sharpness and gate_rows, got 2"):
        torch.ops.trimtab.steering_monitor(*monitor_case(2, 4, device="cuda")._replace(params=torch.zeros(2).cuda()))


@pytest.mark.parametrize(("dtype", "width"), DTYPES_AND_WIDTHS)
def test_monitor_equals_the_oracle(dtype: torch.dtype, width: int) -> None:
    for active, gate_rows in itertools.product([False, True], repeat=2):
        args = monitor_case(17, width, capacity=20, dtype=dtype, active=active, gate_rows=gate_rows, device="cuda")
        token_scales, row_gate = monitored(args)
        torch.ops.trimtab.steering_monitor(*args)
        # a float32 dot product of up to 16400 terms of unit variance in all, through a sigmoid of sharpness 1.5
        np.testing.assert_allclose(numpy64(args.steering_token_scales), token_scales, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(numpy64(args.steering_row_gate), row_gate, rtol=1e-5, atol=1e-7)


class Stack(nn.Module):
    """Three steered linear layers, buffers as an engine makes them."""

    def __init__(self, width: int, dtype: torch.dtype, *, slab: bool = True, row_monitor: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3)).to("cuda", dtype)
        sites = [Site(number, POST) for number in range(3)]
        shape = {"max_rows": 5, "max_tokens": max(SIZES), "dtype": dtype, "device": "cuda"}
        if slab:
            self.owner = SteeringBuffers(sites, hidden_size=width, **shape)  # type: ignore[arg-type]
        for layer, site in zip(self.layers, sites, strict=True):
            if slab:
                self.owner.attach(layer, site)
            else:
                register_steering_buffers(layer, width, **shape)  # type: ignore[arg-type]
        share_token_buffers(self.layers)
        if row_monitor:
            resize_row_monitor_buffers(self.layers)

    def emission(self, mode: Emission) -> "Stack":
        for layer in self.layers:
            set_emission(layer, mode)
        return self

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        for layer in self.layers:
            x = emit(layer, POST, layer(x), in_place=in_place)
        return x

    def randomize(self, seed: int) -> None:
        """New contents for every buffer that a server may change while it runs."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            for name, buffer in layer.named_buffers():
                values = torch.rand(buffer.shape, generator=generator)
                if name == "steering_index":
                    values = torch.randint(0, 5, buffer.shape, generator=generator)
                elif name == "steering_monitor_off":
                    continue
                elif buffer.dtype == torch.bool:
                    values = values < 0.7
                elif name.endswith(("probe", "probe_table")):
                    values = (values - 0.5) * 0.2
                buffer.copy_(values)
            layer.steering_table_post_block[0] = 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.layers[0].steering_token_scales, self.layers[0].steering_row_gate


def keeping_factors(stack: Stack, run: Callable[[], Tensor]) -> Tensor:
    """`run`, with the per-token factors that a cross-layer monitor multiplies put back as a step's upload does."""
    before = [factor.clone() for factor in stack.factors()]
    out = run().clone()
    for factor, values in zip(stack.factors(), before, strict=True):
        factor.copy_(values)
    return out


def across_layers(dtype: torch.dtype) -> dict[str, float]:
    """Tolerance after three layers: each may round to the other neighbour and passes that on through its weights.

    The constant is for float32, where the order of summation in matmuls and scores differs.
    """
    eps = torch.finfo(dtype).eps
    return {"rtol": 8 * eps, "atol": 16 * eps + 5e-5}


APPLY_VARIANTS = 2  # out of place and in place
MONITOR_VARIANTS = 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_monitor", [False, True])
@pytest.mark.parametrize("slab", [False, True])
def test_warm_up_compiles_the_known_variants_and_service_none(
    dtype: torch.dtype, row_monitor: bool, slab: bool
) -> None:
    from trimtab.ops.kernels.apply_steering import apply_steering_kernel
    from trimtab.ops.seed.steering_monitor import steering_monitor_kernel

    apply_steering_kernel.device_caches.clear()
    steering_monitor_kernel.device_caches.clear()
    stack = Stack(64, dtype, slab=slab, row_monitor=row_monitor)
    assert warmup_apply_steering_kernel(stack.layers, SIZES) == APPLY_VARIANTS
    assert warmup_steering_monitor_kernel(stack.layers, SIZES) == MONITOR_VARIANTS
    assert compiled_variants(apply_steering_kernel) == APPLY_VARIANTS
    assert compiled_variants(steering_monitor_kernel) == MONITOR_VARIANTS
    assert warmup_apply_steering_kernel(stack.layers, SIZES) == 0
    assert warmup_steering_monitor_kernel(stack.layers, SIZES) == 0
    late = late_variants()
    for seed, cross_layer in enumerate([False, True]):
        stack.emission(Emission(cross_layer=cross_layer)).randomize(seed)
        for tokens in SIZES:
            for in_place in (False, True):
                stack(torch.randn(tokens, 64, device="cuda", dtype=dtype), in_place=in_place)
    assert compiled_variants(apply_steering_kernel) == APPLY_VARIANTS
    assert compiled_variants(steering_monitor_kernel) == MONITOR_VARIANTS
    assert late_variants() == late
    stack(torch.randn(4, 64, device="cuda", dtype=dtype), in_place=True)
    other = DTYPES[(DTYPES.index(dtype) + 1) % 3]
    Stack(64, other)(torch.randn(4, 64, device="cuda", dtype=other))  # never warmed: must be noticed
    assert late_variants() == late + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_graph_captured_once_follows_every_change_of_its_buffers(
    dtype: torch.dtype, cross_layer: bool, in_place: bool
) -> None:
    stack = Stack(128, dtype, row_monitor=True).emission(Emission(cross_layer=cross_layer))
    warmup_apply_steering_kernel(stack.layers, [17])
    warmup_steering_monitor_kernel(stack.layers, [17])
    x = torch.randn(17, 128, device="cuda", dtype=dtype)
    stack(x, in_place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stack(x, in_place)

    def replay() -> Tensor:
        graph.replay()
        return out

    for seed in range(4):
        if seed:
            stack.randomize(seed)
        x.copy_(torch.randn(17, 128, device="cuda"))
        eager = keeping_factors(stack, lambda: stack(x, in_place))
        replayed = keeping_factors(stack, replay)
        assert torch.equal(replayed, eager)
        plain = x
        for layer in stack.layers:
            plain = layer(plain)
        assert torch.equal(replayed, plain) is (seed == 0)  # seed 0: captured while everything is at its default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cross_layer", [False, True])
@torch.no_grad()
def test_traced_form_and_kernels_agree(dtype: torch.dtype, cross_layer: bool) -> None:
    stack = Stack(128, dtype, row_monitor=True)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, dynamic=True)
    for seed, tokens in enumerate([5, 17, 256, 1]):
        stack.randomize(seed)
        for layer in stack.layers:
            layer.steering_table_post_block_any_active.fill_(True)  # the traced form does not read it
        x = torch.randn(tokens, 128, device="cuda", dtype=dtype)
        stack.emission(Emission(cross_layer=cross_layer))
        launched = keeping_factors(stack, lambda x=x: stack(x))  # type: ignore[misc]
        stack.emission(Emission(traced=True, cross_layer=cross_layer))
        traced = keeping_factors(stack, lambda x=x: compiled(x))  # type: ignore[misc]
        torch.testing.assert_close(traced, launched, **across_layers(dtype))


@torch.no_grad()
def test_terms_left_out_of_the_trace_leave_rows_alone() -> None:
    stack = Stack(128, torch.bfloat16).emission(Emission(traced=True, terms=Terms(False, False, False)))
    stack.randomize(1)
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, dynamic=True)
    x = torch.randn(9, 128, device="cuda", dtype=torch.bfloat16)
    traced = compiled(x)
    for layer in stack.layers:
        layer.steering_table_post_block_any_active.fill_(True)
        layer.steering_table_post_block_monitor_active.fill_(False)
        layer.steering_table_post_block_monitor_row_active.fill_(False)
        layer.steering_table_post_block_dynamic_vec.zero_()
    torch.testing.assert_close(traced, stack.emission(Emission())(x), **across_layers(torch.bfloat16))
