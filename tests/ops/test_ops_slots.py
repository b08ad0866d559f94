"""What slots do, on the CPU: the operator, the traced form and the buffers, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_oracle import TOLERANCE
from slots_cases import POST, after, assert_noted, explained, slotted
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from trimtab.ops import (
    ROWS_ONLY,
    Emission,
    SlotForm,
    SlotOpArgs,
    SteeringBuffers,
    emit,
    library,
    set_emission,
    slot_form,
    slot_op_args,
    slot_record,
)
from trimtab.ops.reference import Slots, apply_slots
from trimtab.ops.sizes import row_bytes
from trimtab.sites import HookPoint, Site

SITES = tuple(Site(layer, POST) for layer in range(2))
FORM = SlotForm(2, ("clip",), writes=False)
operator = torch.ops.trimtab.apply_slots_


def close(found: Tensor, expected: np.ndarray) -> None:
    """One rounding of the dtype, and the float32 error of scores and of what they are multiplied with."""
    scale = 1 + np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    tolerance = {"rtol": TOLERANCE[found.dtype]["rtol"], "atol": 2e-6 * scale}
    np.testing.assert_allclose(found.double().numpy(), expected, **tolerance)


@given(
    tokens=st.integers(0, 9),
    width=st.integers(1, 70),
    slots=st.integers(1, 5),
    dtype=st.sampled_from(list(TOLERANCE)),
    gates=st.integers(0, 3),
    writes=st.booleans(),
    split=st.booleans(),
    strided=st.booleans(),
    form=st.sampled_from([operator, library._slots_any_device]),
    wild=st.sampled_from([0.0, float("inf"), float("nan")]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_the_operator_is_the_formula(tokens, width, slots, dtype, gates, writes, split, strided, form, wild, seed):
    """`wild` stands in tokens that nobody steers."""
    case = slotted(tokens, width, slots=slots, gates=gates, writes=writes, dtype=dtype, seed=seed)
    random = torch.Generator().manual_seed(seed)
    steered, rest = (torch.randn(tokens, 2 * width, generator=random).to(dtype) for _ in range(2))
    steered, rest = (tensor[:, ::2] if strided else tensor[:, :width] for tensor in (steered, rest))
    steered[case.buffers.index[:tokens] == 0] = wild
    args = case.args(steered, rest if split else None)
    expected, told = explained(args)
    form(*args)
    close(steered, expected)
    assert_noted(args, told, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 4), st.integers(0, 10_000), st.sampled_from(list(TOLERANCE)))
@settings(max_examples=60, deadline=None)
def test_each_projection_of_a_set_lands_where_it_was_asked_to(count, seed, dtype):
    """Directions that overlap, mixed by the inverse of their products: one is removed, the others kept in bounds."""
    rng = np.random.default_rng(seed)
    width = 96
    common = rng.standard_normal(width)
    directions = np.stack([common + 1.5 * rng.standard_normal(width) for _ in range(count)])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    buffers = SteeringBuffers(
        SITES[:1],
        hidden_size=width,
        max_rows=count + 2,
        max_tokens=4,
        dtype=dtype,
        slots=SlotForm(count, ("clip",), False),
    )
    buffers.table[0, 1 : count + 1] = torch.from_numpy(directions).to(dtype)
    rounded = buffers.table[0, 1 : count + 1].double().numpy()
    slots, row = buffers.slots, count + 1
    slots.rows[0, row, :, 0] = torch.arange(1, count + 1)
    slots.params[0, row, :, 0] = slots.params[0, row, :, 2] = 1.0
    slots.params[0, row, 1:, 3], slots.params[0, row, 1:, 4] = -0.5, float("inf")
    slots.mix[0, row] = torch.from_numpy(np.linalg.inv(rounded @ rounded.T))
    buffers.index[1:4] = row
    module = nn.Module()
    buffers.attach(module, SITES[0])
    stream = torch.from_numpy(rng.standard_normal((4, width))).float()  # the operator steers it unrounded
    before = stream.double().numpy() @ rounded.T
    slots_of = slot_op_args(module, POST, stream, None)
    z = apply_slots(stream, Slots(*slots_of[3:]), buffers.slots.form).double().numpy() @ rounded.T
    np.testing.assert_allclose(z[0], before[0], atol=1e-6)
    np.testing.assert_allclose(z[1:, 0], 0.0, atol=2e-5)
    np.testing.assert_allclose(z[1:, 1:], np.maximum(before[1:, 1:], -0.5), atol=2e-5)


@pytest.mark.parametrize("bounds", [(0.0, np.inf), (-np.inf, 0.0), (-np.inf, np.inf)])
def test_a_score_that_overflows_within_infinite_bounds_changes_nothing(bounds):
    case = slotted(1, 8, slots=1, responses=("clip",))
    state, sign = case.buffers.slots, 1.0 if bounds[1] > 0 else -1.0
    case.buffers.index[0] = 1
    case.buffers.table[0, 2] = 1e30
    state.codes[0, 1] = 0
    state.rows[0, 1, 0] = torch.tensor([2, 0])
    state.params[0, 1, 0, :5] = torch.tensor([1.0, 0.0, 1.0, *bounds])
    state.mix[0, 1] = 1.0
    steered = torch.full((1, 8), sign * 1e30)
    operator(*case.args(steered))
    assert torch.equal(steered, torch.full((1, 8), sign * 1e30))


def test_the_operator_leaves_at_once_where_no_token_of_the_call_has_a_slot(monkeypatch):
    case = slotted(6, 8)
    case.buffers.index[:6] = 0
    case.buffers.index[6:] = 1  # behind the call
    monkeypatch.setattr(library, "_with_slots", None)
    steered = torch.randn(6, 8)
    before = steered.clone()
    operator(*case.args(steered))
    assert torch.equal(steered, before)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_slots_read_the_stream_once_all_that_is_added_has_been(in_place, split):
    case = slotted(9, 24, gates=2, seed=3)
    buffers = case.buffers
    buffers.gates.slab.zero_()
    buffers.gates.sites[:9, 0] = buffers.gates.probes[:9, 0] = 0
    buffers.row_gate[:9] = torch.rand(9)
    hidden, rest = torch.randn(9, 24), torch.randn(9, 24) if split else None
    added = hidden + buffers.table[0, buffers.index[:9]] * buffers.row_gate[:9, None]
    expected = after(case.args(added, rest))
    out = emit(case.module, POST, hidden.clone(), rest=rest, in_place=in_place)
    close(out, expected)
    assert (out - added).abs().max() > 0.1


class Layers(nn.Module):
    """Two steered layers with a norm behind each, the stream in one part or in two. Tells what each site returned."""

    def __init__(self, buffers: SteeringBuffers, split: bool) -> None:
        super().__init__()
        self.sites = nn.ModuleList(nn.Module() for _ in buffers.sites)
        self.split = split
        for module, site in zip(self.sites, buffers.sites, strict=True):
            buffers.attach(module, site)
            set_emission(module, Emission(traced=True, terms=ROWS_ONLY))

    def forward(self, hidden, residual):
        told = []
        for module in self.sites:
            told.append(emit(module, POST, hidden, rest=residual if self.split else None))
            stream = told[-1].float() + residual.float() if self.split else told[-1].float()
            hidden = (stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype).tanh()
        return told


@pytest.mark.parametrize(
    ("slots", "gates", "writes", "split", "dtype"),
    [
        (1, 0, False, False, torch.float32),
        (3, 2, True, True, torch.bfloat16),
        (2, 0, True, False, torch.float16),
    ],
)
def test_the_traced_form_is_the_formula_rounded_once_and_follows_every_change(slots, gates, writes, split, dtype):
    case = slotted(6, 64, slots=slots, gates=gates, writes=writes, dtype=dtype)
    layers = Layers(case.buffers, split)
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, dynamic=True)
    for seed in range(3):
        other = slotted(6, 64, slots=slots, gates=gates, writes=writes, dtype=dtype, seed=seed).buffers
        case.buffers.table.copy_(other.table)
        case.buffers.slots.slab.copy_(other.slots.slab)
        case.buffers.index.copy_(other.index)
        hidden, rest = (30 * torch.randn(6, 64).to(dtype) for _ in range(2))
        hidden[case.buffers.index[:6] == 0, 0] = float("nan")
        if gates:
            case.buffers.gates.values.copy_(other.gates.values)
            case.buffers.gates.sites[:6] = 1
            case.buffers.gates.params[:6, :, 2] = 1.0  # half open: with probes of zeros a hard gate is shut
            hidden.nan_to_num_()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=seed > 0):
            out = compiled(hidden, rest)[0]
        unrounded = hidden.double() + case.buffers.table[0, case.buffers.index[:6]].double()
        args = slot_op_args(layers.sites[0], POST, unrounded, rest if split else None)
        expected, corrections = explained(args)
        close(out, expected)
        assert_noted(args, corrections, rtol=1e-4, atol=1e-3)
        assert np.abs(np.nan_to_num(expected - unrounded.numpy())).max() > 0.1


def test_the_traced_form_rounds_once_not_between_what_is_added_and_what_slots_write():
    """256 and a quarter is 256 in bfloat16; a slot takes 256 off. Run as traced: Inductor leaves out roundings."""
    buffers = SteeringBuffers(
        SITES[:1], hidden_size=8, max_rows=3, max_tokens=4, dtype=torch.bfloat16, slots=FORM._replace(writes=True)
    )
    buffers.table[0, 1], buffers.table[0, 2] = 0.25, 1.0
    state = buffers.slots
    state.rows[0, 1, 0, 1] = 2
    state.params[0, 1, 0, 1:3] = torch.tensor([-256.0, -1.0])
    state.mix[0, 1, 0, 0] = 1.0
    buffers.index[:2] = 1
    layers = Layers(buffers, split=False)
    torch._dynamo.reset()
    steer = torch.compile(lambda x: emit(layers.sites[0], POST, x), backend="eager", fullgraph=True)
    assert torch.equal(steer(torch.full((2, 8), 256.0).bfloat16()), torch.full((2, 8), 0.25).bfloat16())


def graphs(buffers: SteeringBuffers) -> str:
    """What dynamo makes of the first layer."""
    layers, texts = Layers(buffers, split=False), []

    def backend(graph, _inputs):
        texts.append(graph.print_readable(print_output=False))
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: emit(layers.sites[0], POST, x), backend=backend, fullgraph=True)(torch.randn(4, 8))
    return "\n".join(texts)


def engine(**options) -> SteeringBuffers:
    return SteeringBuffers(SITES, hidden_size=8, max_rows=3, max_tokens=8, dtype=torch.float32, **options)


def test_what_was_not_declared_is_in_no_graph_and_in_no_memory():
    plain, apart, here = (
        engine(),
        engine(slots=FORM, slot_sites=SITES[1:]),
        engine(slots=FORM, slot_sites=SITES[:1]),
    )
    assert graphs(plain) == graphs(apart) != graphs(here)
    assert "slot_" in graphs(here)
    assert plain.slots is None
    assert apart.slots.sites == SITES[1:]
    assert apart.nbytes - plain.nbytes == 3 * slot_record(FORM).itemsize + 4 * FORM.count * 8  # rows, and tokens
    module = nn.Module()
    apart.attach(module, SITES[0])
    assert slot_form(module, POST) is None
    assert not any("slot" in name for name, _ in module.named_buffers())
    apart.attach(module, SITES[1])
    assert slot_form(module, POST) == FORM
    assert slot_form(module, HookPoint.MLP_OUT) is None


def test_only_what_the_form_declares_is_computed():
    """Another place to write, and gates, are in a graph only where they can be."""
    texts = {}
    for writes, gates in ((False, 0), (True, 0), (False, 2)):
        texts[writes, gates] = graphs(engine(slots=SlotForm(1, ("clip",), writes), gates=gates, probe_sites=SITES[:1]))
    assert len({text.count("torch.where") for text in texts.values()}) == 3
    assert "steering_gate_values" in texts[False, 2]
    assert "steering_gate_values" not in texts[False, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_part_of_every_record_starts_on_16_bytes_and_is_what_the_record_says(count):
    buffers = engine(slots=SlotForm(count, ("clip",), writes=True)).slots
    record = slot_record(buffers.form)
    lines = np.zeros((2, 3), record)
    for name in record.names:
        lines[name] = np.random.default_rng(0).integers(1, 9, lines[name].shape)
        part = getattr(buffers, name)
        assert part.shape == (2, 3, *record[name].shape)
        assert all(part[place, row].data_ptr() % 16 == 0 for place, row in np.ndindex(2, 3))
    buffers.slab.copy_(torch.from_numpy(lines.view(np.uint8).reshape(2, 3, -1)))
    for name in record.names:
        assert np.array_equal(getattr(buffers, name).numpy(), lines[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_costs_the_bytes_that_are_foretold(dtype):
    def held(rows: int) -> int:
        sites = [Site(layer, POST) for layer in range(3)]
        return SteeringBuffers(
            sites, hidden_size=16, max_rows=rows, max_tokens=4, dtype=dtype, slots=FORM, slot_sites=sites[1:]
        ).nbytes

    assert held(8) - held(6) == 2 * row_bytes(3, 16, dtype, slots=FORM, slot_sites=2)


def test_a_form_without_slots_or_without_a_response_is_refused():
    for form in (FORM._replace(count=0), FORM._replace(responses=())):
        with pytest.raises(ValueError, match="at least one"):
            engine(slots=form)


def test_shapes_that_no_backend_could_read_are_refused():
    args = slotted(4, 8, gates=1).args(torch.randn(4, 8), torch.randn(4, 8))
    for bad in (
        {"steered": torch.randn(8)},
        {"steered": torch.randn(4, 7)},
        {"hidden_rest": torch.randn(2, 8)},
        {"hidden_rest": torch.randn(4, 7)},
        {"hidden_states": torch.randn(2, 8)},
        {"hidden_states": torch.randn(4, 7)},
        {"steering_index": args.steering_index[:2]},
        {"slot_rows": args.slot_rows[1:]},
        {"slot_codes": args.slot_codes[:, :1]},
        {"slot_params": args.slot_params[..., :9]},
        {"slot_mix": args.slot_mix[..., :1]},
        {"gate_values": args.gate_values[:, :2]},
        {"gate_values": args.gate_values[0]},
        {"slot_corrections": args.slot_corrections[:, :2]},
        {"slot_corrections": args.slot_corrections[:1]},
    ):
        with pytest.raises(ValueError, match=r".+"):
            operator(*args._replace(**bad))


def test_the_registered_schema_is_the_tuple():
    schema = operator.default._schema
    assert tuple(argument.name for argument in schema.arguments) == SlotOpArgs._fields
    assert [argument.name for argument in schema.arguments if argument.alias_info is not None] == [
        "steered",
        "slot_corrections",
    ]


@pytest.mark.parametrize("split", [False, True])
def test_the_operator_passes_opcheck(split):
    case = slotted(5, 20, gates=2)
    opcheck(operator.default, tuple(case.args(torch.randn(5, 20), torch.randn(5, 20) if split else None)))


@given(
    st.sampled_from([("clip",), ("turn",), ("feature",), ("clip", "turn"), ("clip", "turn", "feature")]),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_only_the_responses_that_are_declared_are_in_the_expression(responses, slots, seed):
    """The traced form knows the names; the operator does not, and computes the same."""
    case = slotted(6, 20, slots=slots, gates=1, responses=responses, seed=seed)
    steered = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed % 2**31))
    expected = after(case.args(steered))
    form = case.buffers.slots.form
    found = apply_slots(steered.clone(), Slots(*case.args(steered)[3:]), form)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("wild", [float("inf"), float("nan"), -3e38])
def test_tokens_without_slots_keep_whatever_numbers_they_have(wild):
    for responses in (("clip",), ("turn",), ("feature",), ("clip", "turn")):
        case = slotted(5, 9, slots=3, responses=responses)
        case.buffers.index.zero_()
        steered = torch.full((5, 9), wild)
        found = apply_slots(steered.clone(), Slots(*case.args(steered)[3:]), case.buffers.slots.form)
        torch.testing.assert_close(found, steered, rtol=0, atol=0, equal_nan=True)


def test_an_engine_without_a_response_has_none_of_it_in_its_graph():
    def operators(*responses: str) -> list[str]:
        case = slotted(5, 9, slots=2, responses=responses)
        args = case.args(torch.zeros(5, 9))

        def run(steered):
            return apply_slots(steered, Slots(*args[3:]), case.buffers.slots.form)

        return [str(node.target) for node in make_fx(run)(torch.zeros(5, 9)).graph.nodes]

    assert not any("sqrt" in name for name in operators("clip"))
    assert any("sqrt" in name for name in operators("clip", "turn"))
    rows = [sum("index" in name for name in operators(*names)) for names in (("clip", "turn"), ("clip", "feature"))]
    assert rows[1] == rows[0] + 2 * 2  # two more of what each slot reads, which are in no graph without `feature`
