"""The operators against a float64 oracle, over shapes, dtypes and flags; and what PyTorch asks of operators."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import monitor_case, steering_case
from ops_oracle import assert_steered, monitored, numpy64
from torch.library import opcheck

from trimtab.ops import ALL_TERMS, Terms
from trimtab.ops.library import _apply_any_device
from trimtab.ops.reference import apply_steering as reference

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
MONITOR_RTOL = 5e-6  # float32 dot product of at most 300 terms, times a sharpness below 2, through a sigmoid

steering_cases = st.builds(
    lambda tokens, spare, **kw: steering_case(tokens, capacity=tokens + spare, **kw),
    st.integers(0, 9),
    st.integers(0, 3),
    width=st.integers(1, 300),
    rows=st.integers(1, 6),
    dtype=DTYPES,
    table_dtype=DTYPES,
    active=st.sampled_from([True, True, True, False]),
    monitor=st.booleans(),
    gate_rows=st.booleans(),
    row_monitor=st.booleans(),
    row_active=st.booleans(),
    tier=st.booleans(),
    seed=st.integers(0, 2**31),
)
monitor_cases = st.builds(
    lambda tokens, spare, **kw: monitor_case(tokens, capacity=tokens + spare, **kw),
    st.integers(0, 9),
    st.integers(0, 3),
    width=st.integers(1, 300),
    dtype=DTYPES,
    active=st.booleans(),
    gate_rows=st.booleans(),
    seed=st.integers(0, 2**31),
)


@given(steering_cases)
@settings(max_examples=200, deadline=None)
def test_operator_equals_the_oracle(args) -> None:
    out = torch.ops.trimtab.apply_steering(*args)
    assert (out.shape, out.dtype) == (args.hidden_states.shape, args.hidden_states.dtype)
    assert out.is_contiguous()
    assert_steered(out, args)


@given(steering_cases)
@settings(max_examples=100, deadline=None)
def test_form_for_other_devices_equals_the_oracle(args) -> None:
    assert_steered(_apply_any_device(*args), args)


@given(steering_cases)
@settings(max_examples=50, deadline=None)
def test_in_place_form_equals_the_operator(args) -> None:
    expected = torch.ops.trimtab.apply_steering(*args)
    torch.ops.trimtab.apply_steering_(*args)
    assert torch.equal(args.hidden_states, expected)


@given(monitor_cases)
@settings(max_examples=200, deadline=None)
def test_monitor_equals_the_oracle(args) -> None:
    token_scales, row_gate = monitored(args)
    torch.ops.trimtab.steering_monitor(*args)
    np.testing.assert_allclose(numpy64(args.steering_token_scales), token_scales, rtol=MONITOR_RTOL, atol=1e-7)
    np.testing.assert_allclose(numpy64(args.steering_row_gate), row_gate, rtol=MONITOR_RTOL, atol=1e-7)


@pytest.mark.parametrize("field", ["tier", "monitor", "row_monitor", "row_scales"])
def test_a_term_left_out_of_the_trace_is_the_term_switched_off(field: str) -> None:
    args = steering_case(6, 20, monitor=True, gate_rows=True, row_monitor=True)
    off = {
        "tier": {"steering_dynamic_vec": torch.zeros(20)},
        "monitor": {"steering_monitor_active": torch.tensor([False])},
        "row_monitor": {"steering_monitor_row_active": torch.tensor([False])},
        "row_scales": {"steering_scales": torch.ones_like(args.steering_scales)},
    }[field]
    without = reference(args, Terms(**{field: False}))
    torch.testing.assert_close(without, reference(args._replace(**off), ALL_TERMS))
    assert not torch.allclose(without, reference(args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_monitor", [False, True])
def test_operators_pass_opcheck(dtype: torch.dtype, row_monitor: bool) -> None:
    args = steering_case(5, 20, dtype=dtype, capacity=8, monitor=True, gate_rows=True, row_monitor=row_monitor)
    opcheck(torch.ops.trimtab.apply_steering.default, tuple(args))
    opcheck(torch.ops.trimtab.apply_steering_.default, tuple(args))
    opcheck(torch.ops.trimtab.steering_monitor.default, tuple(monitor_case(5, 20, dtype=dtype, gate_rows=True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 5)}, "hidden_states is 5 wide, steering_table 4"),
        ({"hidden_states": torch.zeros(2, 2, 4)}, r"must be \[N, H\]"),
        ({"steering_monitor_probe_table": torch.zeros(5, 3)}, r"\[1, 1\] or, with the row monitor, \[5, 4\]"),
        ({"steering_monitor_probe_table": torch.zeros(5, 4)}, r"steering_monitor_row_params must be \[5, 2\]"),
        ({"steering_index": torch.zeros(1, dtype=torch.int64)}, "2 tokens, but a per-token buffer holds 1"),
        ({"steering_decode_mask": torch.zeros(1)}, "2 tokens, but a per-token buffer holds 1"),
    ],
)
def test_shapes_that_a_kernel_would_overrun_are_refused(change, message: str) -> None:
    args = steering_case(2, 4)._replace(**change)
    with pytest.raises(ValueError, match=message):
        torch.ops.trimtab.apply_steering(*args)
    with pytest.raises(ValueError, match=message):
        torch.ops.trimtab.apply_steering_(*args)


def test_monitor_refuses_a_probe_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"probe must be \[4\], got \(5,\)"):
        torch.ops.trimtab.steering_monitor(*monitor_case(2, 4)._replace(probe=torch.zeros(5)))
