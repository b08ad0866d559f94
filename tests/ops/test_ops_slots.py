"""What slots do, on the CPU: the operator, the traced form and the form of the buffers, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_oracle import TOLERANCE
from slots_cases import after, slotted
from torch.fx.experimental.proxy_tensor import make_fx

from trimtab.ops.reference import Slots, apply_slots

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@given(
    st.integers(0, 9),
    st.integers(1, 70),
    st.integers(1, 5),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_the_operator_is_the_formula(tokens, width, slots, dtype, gates, writes, split, seed):
    case = slotted(tokens, width, slots=slots, gates=gates, writes=writes, dtype=dtype, seed=seed)
    random = torch.Generator().manual_seed(seed % 2**31)
    steered = torch.randn(tokens, width, generator=random).to(dtype)
    rest = torch.randn(tokens, width, generator=random).to(dtype) if split else None
    expected = after(case.args(steered, rest))
    torch.ops.trimtab.apply_slots_(*case.args(steered, rest))
    scale = 1 + np.abs(expected).max(initial=0.0)
    rtol, atol = TOLERANCE[dtype]["rtol"], 2e-6 * scale
    np.testing.assert_allclose(steered.double().numpy(), expected, rtol=rtol, atol=atol)


@given(st.sampled_from([("clip",), ("turn",), ("clip", "turn")]), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_only_the_responses_that_are_declared_are_in_the_expression(responses, slots, seed):
    """The traced form knows the names; the operator does not, and computes the same."""
    case = slotted(6, 20, slots=slots, gates=1, responses=responses, seed=seed)
    steered = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed % 2**31))
    expected = after(case.args(steered))
    form = case.buffers.slots.form
    found = apply_slots(steered.clone(), Slots(*case.args(steered)[2:]), form)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("wild", [float("inf"), float("nan"), -3e38])
def test_tokens_without_slots_keep_whatever_numbers_they_have(wild):
    for responses in (("clip",), ("turn",), ("clip", "turn")):
        case = slotted(5, 9, slots=3, responses=responses)
        case.buffers.index.zero_()
        steered = torch.full((5, 9), wild)
        found = apply_slots(steered.clone(), Slots(*case.args(steered)[2:]), case.buffers.slots.form)
        torch.testing.assert_close(found, steered, rtol=0, atol=0, equal_nan=True)


def test_an_engine_without_a_response_has_none_of_it_in_its_graph():
    def operators(*responses: str) -> list[str]:
        case = slotted(5, 9, slots=2, responses=responses)
        args = case.args(torch.zeros(5, 9))

        def run(steered):
            return apply_slots(steered, Slots(*args[2:]), case.buffers.slots.form)

        return [str(node.target) for node in make_fx(run)(torch.zeros(5, 9)).graph.nodes]

    assert not any("sqrt" in name for name in operators("clip"))
    assert any("sqrt" in name for name in operators("clip", "turn"))
