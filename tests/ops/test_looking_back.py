"""Slots that look at the stream before steering: the operator, and what engines call, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slots_cases import POST, SITE, Slotted, after, assert_noted, explained, slotted
from torch import Tensor, nn

from trimtab.ops import ROWS_ONLY, Emission, SlotForm, SteeringBuffers, emit, set_emission
from trimtab.responses import RESPONSES

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@given(
    st.integers(0, 9), st.integers(1, 70), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.integers(0, 10_000)
)
def test_the_operator_is_the_formula(tokens, width, slots, gates, split, seed):
    case = slotted(tokens, width, slots=slots, gates=gates, seed=seed, looks_back=True)
    random = torch.Generator().manual_seed(seed)
    steered, hidden, rest = (torch.randn(tokens, width, generator=random) for _ in range(3))
    args = case.args(steered, rest if split else None, hidden)
    expected, told = explained(args)
    torch.ops.trimtab.apply_slots_(*args)
    scale = 1 + np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(steered.double().numpy() / scale, expected / scale, **TOLERANCE)
    assert_noted(args, told, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("split", [False, True])
def test_compiled_it_is_the_formula_behind_all_that_is_added(split):
    case = slotted(6, 64, slots=3, seed=3, looks_back=True)
    buffers = case.buffers
    set_emission(case.module, Emission(traced=True, terms=ROWS_ONLY))
    buffers.row_gate[:6] = torch.rand(6)
    hidden, rest = torch.randn(6, 64), torch.randn(6, 64) if split else None
    added = hidden + buffers.table[0, buffers.index[:6]] * buffers.row_gate[:6, None]
    expected = after(case.args(added, rest, hidden))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: emit(case.module, POST, x, rest=rest), fullgraph=True)
    for found in (compiled(hidden), emit(case.module, POST, hidden.clone(), rest=rest, in_place=True)):
        np.testing.assert_allclose(found.double().numpy(), expected, **TOLERANCE)


TOKENS, WIDTH = 6, 64


def adding(response: str, dtype: torch.dtype, *, gates: bool, row_monitor: bool) -> Slotted:
    """Every token receives row 1, and its slot is of `response`; with gates, row 3 too, and one gate is the slot's."""
    buffers = SteeringBuffers(
        [SITE], hidden_size=WIDTH, max_rows=4, max_tokens=TOKENS, dtype=dtype, gates=int(gates), max_probes=2,
        slots=SlotForm(1, ("replace", "norm", "keep_norm"), writes=True), row_monitor=row_monitor,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    buffers.table[0, 1:] = torch.randn(3, WIDTH, generator=random)
    buffers.any_active.fill_(True)
    buffers.index.fill_(1)
    state = buffers.slots
    state.rows[0, 1, 0, 1] = 0 if response == "keep_norm" else 2
    state.codes[0, 1, 0] = torch.tensor([RESPONSES[response].code, int(gates)])
    state.params[0, 1, 0, 2] = {"replace": 1.0, "norm": 0.25, "keep_norm": 0.0}[response]
    state.mix[0, 1] = 1.0
    if gates:
        decided = buffers.gates
        decided.rows.fill_(3), decided.probes.fill_(1), decided.sites.fill_(1)
        decided.params[:] = torch.tensor([1.5, 0.0, 1e-3, 0.0, 0.0])
        decided.probe_table[1] = torch.randn(WIDTH, generator=random) / WIDTH
    module = nn.Module()
    buffers.attach(module, SITE)
    return Slotted(buffers, module, TOKENS)


def unrounded(case: Slotted, hidden: Tensor, rest: Tensor | None) -> np.ndarray:
    """What must come out, in float64."""
    table, stream = case.buffers.table[0].double(), hidden.double() + (0 if rest is None else rest.double())
    added = hidden.double() + table[1]
    args = case.args(added, rest, hidden)
    if case.buffers.gates is not None:
        factor = torch.sigmoid(1e-3 * (stream @ case.buffers.gates.probe_table[1].double()))
        added = added + 1.5 * factor[:, None] * table[3]
        args = args._replace(steered=added, gate_values=factor[None])
    return after(args)


@pytest.mark.parametrize("row_monitor", [False, True])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("response", ["replace", "norm", "keep_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_added_to_a_large_stream_is_rounded_once_and_behind_the_slots(
    dtype, response, split, gates, row_monitor
):
    """Half of the numbers are so large that what is added to them is less than their last digit."""
    case = adding(response, dtype, gates=gates, row_monitor=row_monitor)
    terms = ROWS_ONLY._replace(row_monitor=row_monitor)
    set_emission(case.module, Emission(traced=True, terms=terms))
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=random) * torch.tensor([3000.0, 1.0]).repeat(WIDTH // 2)
    hidden = hidden.to(dtype)
    rest = torch.randn(TOKENS, WIDTH, generator=random).to(dtype) if split else None
    expected = unrounded(case, hidden, rest)
    # One rounding, and the error of float32 next to numbers as large as these.
    rounding = np.abs(torch.from_numpy(expected).to(dtype).double().numpy() - expected)
    allowed = rounding + 2**-20 * float(hidden.abs().max())

    torch._dynamo.reset()
    traced = torch.compile(lambda x: emit(case.module, POST, x, rest=rest), backend="eager", fullgraph=True)
    found = {
        "traced": traced(hidden),
        "not traced": emit(case.module, POST, hidden.clone(), rest=rest),
        "in place": emit(case.module, POST, hidden.clone(), rest=rest, in_place=True),
    }
    for form, out in found.items():
        assert out.dtype is dtype, form
        error = np.abs(out.double().numpy() - expected)
        assert (error <= allowed).all(), (form, (error - allowed).max())
