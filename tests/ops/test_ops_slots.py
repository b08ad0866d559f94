"""What slots do, on the CPU: the operator, the traced form and the form of the buffers, against float64."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_oracle import TOLERANCE
from slots_cases import after, slotted

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
