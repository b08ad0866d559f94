"""Gates against a float64 oracle: the operator, the traced form, and what must hold to the bit."""

import numpy as np
import pytest
import torch
from gates_cases import SITES, Oracle, gated_stack, unjoined
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.ops import ROWS_ONLY, Emission, GateOpArgs, SteeringBuffers, emit, set_emission
from trimtab.ops.gate_buffers import gate_count, gate_op_args
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.sites import HookPoint
from trimtab.vectors import SteeringVector

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # one rounding of values of about 4


@given(
    tokens=st.integers(0, 9),
    width=st.sampled_from([1, 3, 16, 100]),
    gates=st.integers(1, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    split=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=120, deadline=None)
def test_three_sites_in_a_row_give_what_the_formula_says(tokens, width, gates, dtype, split, seed):
    stack = gated_stack(tokens, width, gates=gates, dtype=dtype, seed=seed)
    stack.buffers.gates.values.fill_(float("nan"))  # whatever an earlier pass left behind
    stack.buffers.gates.owns.fill_(-1.0)
    oracle, rng = Oracle(stack), torch.Generator().manual_seed(seed)
    for place in range(len(SITES)):
        hidden = torch.randn(tokens, width, generator=rng).to(dtype)
        rest = torch.randn(tokens, width, generator=rng).to(dtype) if split else None
        steered = torch.randn(tokens, width, generator=rng).to(dtype)
        before = steered.double().numpy()
        torch.ops.trimtab.apply_gates_(*stack.args(place, steered, hidden, rest))
        stream = hidden.double().numpy() + (rest.double().numpy() if split else 0.0)
        expected = before + oracle.added(place, stream)
        sure = [token for token in range(tokens) if token not in oracle.near]
        np.testing.assert_allclose(
            steered.double().numpy()[sure], expected[sure], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
    for (token, slot), factor in oracle.factors.items():
        if token not in oracle.near:
            assert stack.buffers.gates.values[slot, token].item() == pytest.approx(factor, abs=2e-5)
    for token, slot in np.ndindex(tokens, gates):
        if token not in oracle.near:
            own = stack.buffers.gates.owns[slot, token].item()
            assert own == pytest.approx(oracle.owns.get((token, slot), -1.0), abs=2e-5)


@given(power=st.floats(-18, 4), seed=st.integers(0, 1000), dtype=st.sampled_from(list(TOLERANCE)))
@settings(max_examples=60, deadline=None)
def test_probes_of_any_admitted_magnitude_decide_as_the_formula_says(power, seed, dtype):
    rng = np.random.default_rng(seed)
    probe = (rng.standard_normal(16) * 10.0**power).astype(np.float32)
    hidden = torch.from_numpy(rng.standard_normal((4, 16)).astype(np.float32)).to(dtype)
    scores = hidden.double().numpy() @ probe.astype(np.float64)
    sharpness, threshold = np.float32(1 / 10.0**power), np.float32(0.3 * 10.0**power)
    gate = ResolvedGate.of(SteeringVector({SITES[0]: probe}), float(threshold), float(sharpness))
    buffers, modules, _ = alone(dtype=dtype)
    buffers.gates.probe_table[1] = torch.from_numpy(probe)
    buffers.gates.params[:4, 0] = torch.tensor([1.0, gate.threshold, gate.sharpness, 0.0, 0.0])
    buffers.gates.probes[:4, 0] = buffers.gates.sites[:4, 0] = 1
    emit(modules[0], HookPoint.POST_BLOCK, hidden)
    expected = 1.0 / (1.0 + np.exp(-np.float64(sharpness) * (scores - np.float64(threshold))))
    np.testing.assert_allclose(buffers.gates.values[0, :4].double().numpy(), expected, atol=1e-5)


def alone(width=16, dtype=torch.float32, tokens=4):
    """Buffers in which gate 0 of token 0 lets row 1 through, by a probe at the first site."""
    buffers = SteeringBuffers(SITES, hidden_size=width, max_rows=3, max_tokens=8, dtype=dtype, gates=2, max_probes=3)
    buffers.table[:, 1:] = torch.randn(len(SITES), 2, width).to(dtype)
    state = buffers.gates
    state.probe_table[1:] = torch.randn(2, width)
    state.rows[0, 0], state.probes[0, 0], state.sites[0, 0] = 1, 1, 1
    modules = [nn.Module() for _ in SITES]
    for module, site in zip(modules, SITES, strict=True):
        buffers.attach(module, site)
    return buffers, modules, torch.randn(tokens, width).to(dtype)


@pytest.mark.parametrize("threshold", [-1e30, 1e30])
@pytest.mark.parametrize("sharpness", [1.0, 0.0])
@pytest.mark.parametrize("invert", [0.0, 1.0])
def test_an_open_gate_is_no_gate_and_a_shut_one_no_steering_to_the_bit(threshold, sharpness, invert):
    buffers, modules, hidden = alone()
    coefficient = 1.7
    buffers.gates.params[0, 0] = torch.tensor([coefficient, threshold, sharpness, invert, 0.0])
    ungated = SteeringBuffers(SITES, hidden_size=16, max_rows=3, max_tokens=8, dtype=torch.float32)
    ungated.table.copy_(buffers.table)
    ungated.any_active.fill_(True)
    ungated.row_gate[0] = coefficient
    is_open = (threshold < 0) != (invert > 0)
    ungated.index[0] = int(is_open)
    for module, site in zip(modules, SITES, strict=True):
        plain = nn.Module()
        ungated.attach(plain, site)
        expected = emit(plain, HookPoint.POST_BLOCK, hidden)
        assert torch.equal(emit(module, HookPoint.POST_BLOCK, hidden), expected)
        assert torch.equal(expected[0], hidden[0]) != is_open


def test_a_gate_reads_the_stream_before_any_steering_at_its_site():
    buffers, modules, hidden = alone()
    buffers.any_active.fill_(True)
    buffers.index[0] = 2
    buffers.table[0, 2] = 100 * buffers.gates.probe_table[1]  # would carry every token over the threshold
    threshold = float(hidden[0] @ buffers.gates.probe_table[1]) + 0.5
    buffers.gates.params[0, 0] = torch.tensor([1.0, threshold, 0.0, 0.0, 0.0])
    for in_place in (False, True):
        buffers.gates.values.fill_(0.5)
        emit(modules[0], HookPoint.POST_BLOCK, hidden.clone(), in_place=in_place)
        assert buffers.gates.values[0, 0] == 0.0


def test_tokens_without_gates_are_left_alone_to_the_bit_and_write_no_factor():
    buffers, modules, hidden = alone()
    buffers.gates.params[0, 0] = torch.tensor([1.0, -1e30, 1.0, 0.0, 0.0])
    buffers.gates.values.fill_(float("nan"))
    out = emit(modules[0], HookPoint.POST_BLOCK, hidden)
    assert torch.equal(out[1:], hidden[1:])
    assert buffers.gates.values.isnan().sum() == buffers.gates.values.numel() - 1


def test_a_batch_without_gates_leaves_no_gain_of_an_earlier_one():
    """Sites that only add read gains as they lie in memory: 0 times NaN would reach whoever has no gate."""
    buffers, modules, hidden = alone()
    buffers.gates.slab.zero_()
    buffers.gates.gains.fill_(float("nan"))
    torch.ops.trimtab.apply_gates_(
        *gate_op_args(modules[0], HookPoint.POST_BLOCK, hidden.new_empty(0, hidden.shape[1]), hidden, None)
    )
    assert not buffers.gates.gains[:, : len(hidden)].any()
    assert buffers.gates.gains[:, len(hidden) :].isnan().all()


def test_all_memory_of_gates_is_accounted_for():
    buffers, _, _ = alone()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in vars(buffers.gates).values()
        if isinstance(tensor, torch.Tensor)
    }
    assert buffers.gates.nbytes == sum(storages.values())


class Sites(nn.Module):
    """Three steered sites with a norm between them, as a compiled model has them; the stream is kept in two parts."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.sites = nn.ModuleList(modules)

    def forward(self, hidden, residual):
        for module in self.sites:
            residual = emit(module, HookPoint.POST_BLOCK, residual, rest=hidden)
            stream = hidden.float() + residual.float()
            hidden = (stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype).tanh()
            residual = stream.to(residual.dtype)
        return hidden, residual


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("probed", [(1,), (2,), (1, 2), (2, 3)])
def test_the_traced_form_is_the_operator(probed, everywhere):
    """Probes at some sites; the others decide nothing, or could (`everywhere`). An earlier pass left what it left."""
    places = None if everywhere else {SITES[number - 1] for number in probed}
    stack = gated_stack(6, 64, gates=2, seed=5, probe_sites=places)
    gates = stack.buffers.gates
    numbers = torch.tensor(probed, dtype=torch.int32)
    gates.sites[:6] = torch.where(gates.sites[:6] > 0, numbers[gates.sites[:6] % len(probed)], 0)
    unjoined(gates)
    for site in SITES[: min(probed) - 1]:  # what a gate lets through acts from its probe's site on
        stack.buffers.table[SITES.index(site)] = 0
    for module in stack.modules:
        set_emission(module, Emission(traced=True, terms=ROWS_ONLY))
    model = Sites(stack.modules)
    hidden, residual = torch.randn(6, 64), torch.randn(6, 64)
    with torch.no_grad():
        expected = model(hidden, residual)
        factors = gates.values.clone()
        gates.values.fill_(float("nan"))
        gates.gains.fill_(float("nan"))
        torch._dynamo.reset()
        traced = torch.compile(model, fullgraph=True, dynamic=True, backend="inductor")(hidden, residual)
    for got, want in zip(traced, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gates.values.nan_to_num(0.0), factors)
    assert factors.any()


@pytest.mark.parametrize("options", [{}, {"gates": 2, "probe_sites": ()}, {"gates": 2, "probe_sites": SITES[1:]}])
def test_a_site_that_no_gate_can_reach_holds_and_traces_nothing_of_them(options):
    buffers = SteeringBuffers(SITES, hidden_size=8, max_rows=3, max_tokens=8, dtype=torch.float32, **options)
    module = nn.Module()
    buffers.attach(module, SITES[0])
    assert gate_count(module, HookPoint.POST_BLOCK) == 0
    assert not any("gate_" in name and "row_gate" not in name for name, _ in module.named_buffers())
    set_emission(module, Emission(traced=True, terms=ROWS_ONLY))
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: emit(module, HookPoint.POST_BLOCK, x), backend=backend, fullgraph=True)(torch.randn(4, 8))
    assert graphs
    assert not any("gate_rows" in text or "sigmoid" in text for text in graphs)


def test_shapes_that_no_backend_could_read_are_refused():
    stack = gated_stack(4, 8)
    args = stack.args(0, torch.randn(4, 8), torch.randn(4, 8))
    for bad in (
        {"steered": torch.randn(4, 7)},
        {"steered": torch.randn(3, 8)},
        {"hidden_rest": torch.randn(2, 8)},
        {"gate_sites": args.gate_sites[:2]},
        {"gate_params": args.gate_params[..., :4]},
        {"gate_values": args.gate_values[:1]},
        {"gate_gains": args.gate_gains[:, :2]},
        {"gate_owns": args.gate_owns[:1]},
        {"gate_probe_table": torch.zeros(2, 7)},
    ):
        with pytest.raises(ValueError, match=r".+"):
            torch.ops.trimtab.apply_gates_(*args._replace(**bad))


def test_the_registered_schema_is_the_tuple():
    schema = torch.ops.trimtab.apply_gates_.default._schema
    assert tuple(argument.name for argument in schema.arguments) == GateOpArgs._fields
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    assert written == ["steered", "gate_values", "gate_gains", "gate_owns"]
