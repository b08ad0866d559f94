"""What the operator promises, one behaviour per test, on the CPU. The worked numbers are written out by hand."""

import math

import pytest
import torch
from ops_cases import monitor_case, steering_case
from ops_oracle import assert_steered
from torch import Tensor, nn

from trimtab.ops import (
    ROWS_ONLY,
    Emission,
    MonitorOpArgs,
    SteeringBuffers,
    SteeringOpArgs,
    emit,
    register_steering_buffers,
    resize_row_monitor_buffers,
    set_emission,
    steering_op_args,
)
from trimtab.ops.library import SCHEMAS
from trimtab.sites import HookPoint, Site

apply_steering = torch.ops.trimtab.apply_steering
apply_in_place = torch.ops.trimtab.apply_steering_
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGMOID_10 = 1 / (1 + math.exp(-10))


def one_token(**changes: list[float] | list[list[float]]) -> SteeringOpArgs:
    """hidden [1, 0, 0, 0] on row 3 of a registered module: scale 0.5, row gate 0.5, tier [0, 0, 4, 0] at 0.25."""
    module = nn.Module()
    register_steering_buffers(module, 4, max_tokens=1, max_rows=4, dtype=torch.float32)
    resize_row_monitor_buffers([module])
    args = steering_op_args(module, HookPoint.POST_BLOCK, torch.tensor([[1.0, 0, 0, 0]]))
    args.any_active[:] = True
    args.steering_table[3] = torch.tensor([0.0, 2, 0, 0])
    args.steering_index[:] = 3
    args.steering_scales[3] = 0.5
    args.steering_row_gate[:] = 0.5
    args.steering_dynamic_vec[:] = torch.tensor([0.0, 0, 4, 0])
    args.steering_token_scales[:] = 0.25
    for field, values in changes.items():
        getattr(args, field)[...] = torch.tensor(values)
    return args


GLOBAL = {"steering_monitor_active": [True], "steering_monitor_probe": [10.0, 0, 0, 0]}
ROW = {
    "steering_monitor_row_active": [True],
    "steering_monitor_probe_table": [[0.0] * 4] * 3 + [[1.0, 0, 0, 0]],
    "steering_monitor_row_params": [[-1e30, 1.0]] * 3 + [[1.0, 1.0]],
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, [1, 0.5, 1, 0], id="no monitor"),
        pytest.param(
            GLOBAL | {"steering_monitor_params": [0.0, 1, 1], "steering_decode_mask": [1.0]},
            [1, 0.5 * SIGMOID_10, SIGMOID_10, 0],
            id="global monitor gates rows and tier of a decode token",
        ),
        pytest.param(
            GLOBAL | {"steering_monitor_params": [0.0, 1, 1]},
            [1, 0.5, SIGMOID_10, 0],
            id="global monitor leaves the row of a prefill token",
        ),
        pytest.param(
            GLOBAL | {"steering_monitor_params": [10.0, 1, 0]}, [1, 0.5, 0.5, 0], id="global monitor without gate_rows"
        ),
        pytest.param(ROW | {"steering_decode_mask": [1.0]}, [1, 0.25, 1, 0], id="row monitor"),
        pytest.param(
            GLOBAL | ROW | {"steering_monitor_params": [10.0, 1, 1], "steering_decode_mask": [1.0]},
            [1, 0.125, 0.5, 0],
            id="both monitors multiply",
        ),
        pytest.param(
            GLOBAL
            | ROW
            | {"steering_token_scales": [0.0], "steering_row_gate": [1.0], "steering_monitor_params": [0.0, 1, 1]},
            [1, 1, 0, 0],
            id="a prefill token gets its row whole, for any probe",
        ),
    ],
)
def test_worked_numbers(changes: dict[str, list[float]], expected: list[float]) -> None:
    torch.testing.assert_close(
        apply_steering(*one_token(**changes))[0], torch.tensor(expected).float(), rtol=1e-6, atol=1e-7
    )


def test_dp_1_inactive_site_copies_bit_for_bit_and_never_reads_its_table() -> None:
    for dtype in DTYPES:
        args = steering_case(6, 20, dtype=dtype, active=False, monitor=True, row_monitor=True)
        args.steering_table.fill_(torch.nan)
        args.hidden_states[0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
        raw = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(apply_steering(*args).view(raw), args.hidden_states.view(raw))


@pytest.mark.parametrize("active", [False, True])
def test_dp_2_output_is_new_memory_and_the_input_keeps_its_values(active: bool) -> None:
    args = steering_case(6, 20, active=active)
    before = args.hidden_states.clone()
    out = apply_steering(*args)
    out.fill_(7.0)
    assert torch.equal(args.hidden_states, before)


def test_dp_2_in_place_form_declares_its_mutation_and_gives_the_same_values() -> None:
    args = steering_case(6, 20, monitor=True, gate_rows=True, row_monitor=True)
    expected = apply_steering(*args)
    apply_in_place(*args)
    assert torch.equal(args.hidden_states, expected)
    written = [a.name for a in apply_in_place.default._schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["hidden_states"]


def test_dp_2_in_place_form_leaves_an_inactive_site_as_it_is() -> None:
    args = steering_case(6, 20, active=False, monitor=True, row_monitor=True)
    before = args.hidden_states.clone()
    apply_in_place(*args)
    assert torch.equal(args.hidden_states, before)


def test_dp_3_what_stands_beyond_the_last_token_has_no_effect() -> None:
    args = steering_case(4, 20, capacity=9, monitor=True, gate_rows=True, row_monitor=True)
    expected = apply_steering(*args)
    args.steering_index[4:] = 10**12
    for buffer in (args.steering_row_gate, args.steering_token_scales, args.steering_decode_mask):
        buffer[4:] = torch.nan
    assert torch.equal(apply_steering(*args), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dp_4_row_0_adds_nothing_for_any_scale_and_gate(dtype: torch.dtype) -> None:
    args = steering_case(6, 20, dtype=dtype, tier=False)
    args.steering_index.zero_()
    args.steering_scales.fill_(1e30)
    args.steering_row_gate.fill_(-3e4)
    assert torch.equal(apply_steering(*args), args.hidden_states)


def test_dp_5_row_scale_token_gate_and_tier_compose() -> None:
    out = apply_steering(*one_token(steering_scales=[1.0, 1, 1, 3], steering_row_gate=[0.5], steering_token_scales=[2]))
    assert out.tolist() == [[1.0, 2 * 3 * 0.5, 4 * 2, 0.0]]


def test_dp_5_scales_near_one_survive_in_bfloat16() -> None:
    """Rounding each factor to bfloat16 would turn 1.001 into 1 and lose it; one rounding at the end does not."""
    args = steering_case(1, 8, dtype=torch.bfloat16, tier=False)
    args.hidden_states.fill_(-256.0)
    args.steering_table[1] = 256.0
    args.steering_index.fill_(1)
    args.steering_scales.fill_(1.001)
    args.steering_row_gate.fill_(1.0)
    torch.testing.assert_close(apply_steering(*args).float(), torch.full((1, 8), 0.256), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_dp_6_hidden_dtype_in_is_hidden_dtype_out(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    args = steering_case(6, 20, dtype=dtype, table_dtype=table_dtype)
    out = apply_steering(*args)
    assert out.dtype == dtype
    assert_steered(out, args)


def test_dp_7_row_monitor_never_touches_the_tier() -> None:
    args = steering_case(6, 20, row_monitor=True)
    args.steering_table.zero_()
    gated = apply_steering(*args)
    args.steering_monitor_row_active.fill_(False)
    assert torch.equal(gated, apply_steering(*args))


@pytest.mark.parametrize(("gate_rows", "decode", "row_is_gated"), [(0, 1, False), (1, 0, False), (1, 1, True)])
def test_dp_7_global_monitor_gates_the_tier_always_and_rows_of_decode_tokens_with_gate_rows(
    gate_rows: float, decode: float, row_is_gated: bool
) -> None:
    out = apply_steering(
        *one_token(**GLOBAL, steering_monitor_params=[10.0, 1, gate_rows], steering_decode_mask=[decode])
    )
    assert out.tolist() == [[1.0, 0.25 if row_is_gated else 0.5, 0.5, 0.0]]


def test_dp_8_scores_read_the_unsteered_input_and_accumulate_in_float32() -> None:
    """4096 products of 0.01: a bfloat16 accumulator would stall near 2.5, and the steered value would score 0."""
    args = steering_case(1, 4096, dtype=torch.bfloat16, monitor=True, tier=False)
    args.hidden_states.fill_(1.0)
    args.steering_monitor_probe.fill_(0.01)
    args.steering_monitor_params[:] = torch.tensor([40.96, 1.0, 1.0])
    args.steering_decode_mask.fill_(1.0)
    args.steering_index.fill_(1)
    args.steering_table[1] = -1.0
    args.steering_scales.fill_(1.0)
    args.steering_row_gate.fill_(1.0)
    torch.testing.assert_close(apply_steering(*args).float(), torch.full((1, 4096), 0.5), rtol=2**-8, atol=0)


def test_dp_9_default_probes_and_parameters_give_a_gate_of_exactly_one() -> None:
    module = nn.Module()
    register_steering_buffers(module, 8, max_tokens=3, max_rows=4, dtype=torch.float32)
    resize_row_monitor_buffers([module])
    args = steering_op_args(module, HookPoint.POST_BLOCK, torch.randn(3, 8) * 1e4)
    args.any_active.fill_(True)
    args.steering_table[1:] = 1.0
    args.steering_index[:] = torch.tensor([1, 2, 3])
    args.steering_decode_mask.fill_(1.0)
    plain = apply_steering(*args)
    args.steering_monitor_row_active.fill_(True)
    assert torch.equal(apply_steering(*args), plain)
    assert args.steering_monitor_params.tolist() == [0.0, 1.0, 0.0]
    assert args.steering_monitor_row_params.tolist() == [[torch.tensor(-1e30).item(), 1.0]] * 4


def test_dp_10_cross_layer_gate_acts_once_from_its_site_on_and_anew_in_each_step() -> None:
    sites = [Site(layer, HookPoint.POST_BLOCK) for layer in range(3)]
    buffers = SteeringBuffers(sites, hidden_size=4, max_rows=2, max_tokens=2, dtype=torch.float32)
    layers = [nn.Module() for _ in sites]
    for layer, site in zip(layers, sites, strict=True):
        buffers.attach(layer, site)
        set_emission(layer, Emission(cross_layer=True))
    buffers.any_active.fill_(True)
    buffers.table[:, 1, 1] = 8.0  # each site adds 8 to element 1 of row-1 tokens
    buffers.monitor_active[1] = True  # the probe stands in the middle and reads element 0, which is always 1
    buffers.monitor_probe[1, 0] = 1.0
    buffers.monitor_params[1] = torch.tensor([1.0, 1.0, 1.0])  # sigmoid(0): a gate of one half
    for _ in range(2):
        buffers.index.fill_(1)
        buffers.row_gate.fill_(1.0)
        buffers.decode_mask.fill_(1.0)
        x = torch.tensor([[1.0, 0, 0, 0]] * 2)
        added = []
        for layer in layers:
            steered = emit(layer, HookPoint.POST_BLOCK, x)
            added.append((steered - x)[:, 1].tolist())
            x = steered
        assert added == [[8.0, 8.0], [4.0, 4.0], [4.0, 4.0]]


def test_dp_11_short_parameters_are_refused_in_every_implementation() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = steering_case(2, 4)._replace(steering_monitor_params=torch.zeros(2))
    monitor = monitor_case(2, 4)._replace(params=torch.zeros(2))
    calls = [
        (apply_steering, args),
        (apply_in_place, args),
        (torch.ops.trimtab.steering_monitor, monitor),
    ]
    for operator, tensors in calls:
        with pytest.raises(ValueError, match="threshold, sharpness and gate_rows, got 2"):
            operator(*tensors)
        with FakeTensorMode() as mode, pytest.raises(ValueError, match="threshold, sharpness and gate_rows, got 2"):
            operator(*[mode.from_tensor(tensor) for tensor in tensors])


def test_dp_12_no_tokens_and_odd_widths_work() -> None:
    for width in (1, 3, 100, 2560, 2880, 5376):
        args = steering_case(3, width, monitor=True, gate_rows=True, row_monitor=True)
        assert_steered(apply_steering(*args), args)
    for active in (False, True):
        empty = steering_case(0, 8, capacity=4, active=active, monitor=True, row_monitor=True)
        assert apply_steering(*empty).shape == (0, 8)
        apply_in_place(*empty)
        torch.ops.trimtab.steering_monitor(*monitor_case(0, 8, capacity=4))


def test_dp_12_strided_inputs_work() -> None:
    args = steering_case(6, 20, monitor=True, gate_rows=True, row_monitor=True)
    wide = torch.zeros(20, 12)
    strided = args._replace(hidden_states=wide.t()[::2])
    strided.hidden_states.copy_(args.hidden_states)
    slab = torch.zeros(6, 3)
    strided = strided._replace(steering_row_gate=slab[:, 1])
    strided.steering_row_gate.copy_(args.steering_row_gate)
    assert strided.hidden_states.stride() == (2, 12)
    torch.testing.assert_close(apply_steering(*strided), apply_steering(*args))
    apply_in_place(*strided)
    torch.testing.assert_close(strided.hidden_states, apply_steering(*args))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("apply_steering", SteeringOpArgs._fields),
        ("apply_steering_", SteeringOpArgs._fields),
        ("steering_monitor", MonitorOpArgs._fields),
    ],
)
def test_dp_13_registered_schema_is_the_tuple(name: str, fields: tuple[str, ...]) -> None:
    registered = getattr(torch.ops.trimtab, name).default._schema
    assert tuple(argument.name for argument in registered.arguments) == fields
    assert all(str(argument.type) == "Tensor" for argument in registered.arguments)
    assert str(registered) == f"trimtab::{SCHEMAS[name]}"


def test_dp_13_published_orders_are_locked() -> None:
    """Everything else derives from the tuples: here alone are their orders written out once more."""
    assert SteeringOpArgs._fields == (
        "hidden_states",
        "steering_table",
        "steering_index",
        "any_active",
        "steering_scales",
        "steering_dynamic_vec",
        "steering_token_scales",
        "steering_row_gate",
        "steering_monitor_probe",
        "steering_monitor_params",
        "steering_monitor_active",
        "steering_decode_mask",
        "steering_monitor_probe_table",
        "steering_monitor_row_params",
        "steering_monitor_row_active",
    )
    assert MonitorOpArgs._fields == (
        "hidden_states",
        "probe",
        "params",
        "monitor_active",
        "steering_token_scales",
        "steering_decode_mask",
        "steering_row_gate",
    )


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_a_traced_operator_promises_the_tensor_that_it_returns(
    hidden_dtype: torch.dtype, table_dtype: torch.dtype
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = steering_case(6, 20, dtype=hidden_dtype, table_dtype=table_dtype)
    args = args._replace(hidden_states=args.hidden_states.t().contiguous().t())
    real = apply_steering(*args)
    with FakeTensorMode() as mode:
        promised = apply_steering(*[mode.from_tensor(tensor) for tensor in args])
    assert (promised.dtype, promised.shape, promised.stride()) == (real.dtype, real.shape, real.stride())
    assert real.dtype == hidden_dtype


class Stack(nn.Module):
    """Two linear layers, each steered at its output."""

    def __init__(self, mode: Emission) -> None:
        super().__init__()
        sites = [Site(layer, HookPoint.POST_BLOCK) for layer in range(2)]
        self.buffers = SteeringBuffers(sites, hidden_size=16, max_rows=4, max_tokens=32, dtype=torch.float32)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in sites)
        for layer, site in zip(self.layers, sites, strict=True):
            self.buffers.attach(layer, site)
            set_emission(layer, mode)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = emit(layer, HookPoint.POST_BLOCK, layer(x))
        return x


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("cross_layer", [True, False])
def test_dp_14_compiled_graph_sees_every_buffer_change_without_compiling_again(traced: bool, cross_layer: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    stack = Stack(Emission(traced=traced, cross_layer=cross_layer))
    compiled = torch.compile(stack, fullgraph=True, dynamic=True)
    buffers = stack.buffers
    factors = (buffers.row_gate, buffers.token_scales, buffers.decode_mask)
    x = torch.randn(7, 16)
    seen: list[Tensor] = []

    def check() -> None:
        before = [factor.clone() for factor in factors]
        eager = stack(x)
        for factor, value in zip(factors, before, strict=True):
            factor.copy_(value)  # the cross-layer monitor multiplied into them
        out = compiled(x)
        for factor, value in zip(factors, before, strict=True):
            factor.copy_(value)
        torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-5)
        assert not any(torch.equal(out, earlier) for earlier in seen), "this change was not seen"
        seen.append(out)

    with torch.no_grad():
        check()  # traced while every buffer is still at its default
        with torch._dynamo.config.patch(error_on_recompile=True):
            buffers.any_active.fill_(True)
            buffers.index[:7] = torch.tensor([0, 1, 2, 3, 1, 2, 3])
            buffers.table[:, 1:] = torch.randn(2, 3, 16)
            check()
            buffers.scales[1:] = 2.0
            check()
            buffers.row_gate.fill_(0.3)
            check()
            buffers.dynamic_vec.copy_(torch.randn(2, 16))
            buffers.token_scales.fill_(0.25)
            check()
            buffers.monitor_probe.copy_(torch.randn(2, 16))
            buffers.monitor_active.fill_(True)
            check()
            buffers.monitor_params[:] = torch.tensor([0.5, 2.0, 1.0])
            buffers.decode_mask.fill_(1.0)
            check()
            buffers.index.fill_(2)
            check()
            buffers.monitor_active.fill_(False)
            check()


def test_traced_rows_are_fused_into_kernels_that_the_model_has_anyway() -> None:
    """A stack with rows compiles to as many kernels as the unsteered one, counted by the compiler itself."""
    from torch._inductor import metrics

    class NormedStack(Stack):
        def forward(self, x: Tensor) -> Tensor:
            residual = x
            for layer in self.layers:
                residual = emit(layer, HookPoint.POST_BLOCK, residual + layer(x))
                x = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + 1e-6)
            return x + residual

    kernels = {}
    for name, mode in {"unsteered": None, "rows": Emission(traced=True, terms=ROWS_ONLY)}.items():
        torch._dynamo.reset()
        metrics.reset()
        stack = NormedStack(mode or Emission())
        if mode is None:
            stack.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(stack, fullgraph=True, dynamic=True)(torch.randn(7, 16))
        kernels[name] = metrics.generated_kernel_count
    assert kernels["rows"] == kernels["unsteered"] > 0
