"""Slots that look at the stream before steering: the operator, and the traced form once compiled, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slots_cases import POST, after, slotted

from trimtab.ops import ROWS_ONLY, Emission, emit, set_emission

TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@given(
    st.integers(0, 9), st.integers(1, 70), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.integers(0, 10_000)
)
def test_the_operator_is_the_formula(tokens, width, slots, gates, split, seed):
    case = slotted(tokens, width, slots=slots, gates=gates, seed=seed, looks_back=True)
    random = torch.Generator().manual_seed(seed)
    steered, hidden, rest = (torch.randn(tokens, width, generator=random) for _ in range(3))
    args = case.args(steered, rest if split else None, hidden)
    expected = after(args)
    torch.ops.trimtab.apply_slots_(*args)
    scale = 1 + np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(steered.double().numpy() / scale, expected / scale, **TOLERANCE)


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
