"""Runs the kernels in Triton's interpreter against the oracle. A program of its own: `python interpreted_kernels.py`.

The interpreter replaces `triton.jit` while Triton is imported, so it cannot share a process with compiled kernels.
Prints one line with what was compared; raises at the first difference.
"""

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from ops_cases import monitor_case, steering_case
from ops_oracle import assert_steered, monitored, numpy64

from trimtab.ops import SteeringOpArgs
from trimtab.ops.kernels.apply_steering import launch_apply_steering
from trimtab.ops.kernels.launch import Launch
from trimtab.ops.seed.steering_monitor import launch_steering_monitor

PROGRAMS = (1, 3, 5, 6, 7)  # for 7 tokens: one takes all, several take several, some take one, each takes one


def check_steering(args: SteeringOpArgs, programs: int, in_place: bool) -> None:
    """The kernel's output against the oracle; without in_place the input must keep its values."""
    before = args.hidden_states.clone()
    expected = args._replace(hidden_states=before)
    tokens, width = args.hidden_states.shape
    block = 1 << (width - 1).bit_length()
    out = args.hidden_states if in_place else torch.full_like(before, torch.nan, memory_format=torch.contiguous_format)
    launch_apply_steering(args, out, Launch(block, 1, None, min(programs, tokens)))
    assert_steered(out, expected, rounds_toward_zero=True)
    if not in_place:
        assert torch.equal(args.hidden_states, before)
    if not args.any_active.item():
        assert torch.equal(out, before)


def steering_cases() -> int:
    count = 0
    flags = itertools.product([False, True], repeat=6)
    for number, (active, monitor, gate_rows, row_monitor, tier, in_place) in enumerate(flags):
        width = (1, 3, 16, 20, 100, 128)[number % 6]
        dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
        args = steering_case(
            7, width, capacity=9, dtype=dtype, table_dtype=(dtype, torch.float32)[number % 2], active=active,
            monitor=monitor, gate_rows=gate_rows, row_monitor=row_monitor, tier=tier, seed=number,
        )  # fmt: skip
        args.steering_index[7:] = 10**12  # beyond the last token: never read
        check_steering(args, PROGRAMS[number % 5], in_place)
        count += 1
    return count


def layouts() -> int:
    """Strided hidden states, slab-like token buffers, a NaN table at an idle site, and no tokens at all."""
    for in_place in (False, True):
        args = steering_case(7, 20, monitor=True, gate_rows=True, row_monitor=True)
        strided = torch.zeros(20, 14).t()[::2]
        strided.copy_(args.hidden_states)
        gate, tier, mask = (torch.full((7, stride), torch.nan) for stride in (2, 4, 5))  # each with a stride of its own
        gate[:, 1], tier[:, 2], mask[:, 3] = (
            args.steering_row_gate,
            args.steering_token_scales,
            args.steering_decode_mask,
        )
        index = torch.zeros(7, 3, dtype=torch.int64)
        index[:, 1] = args.steering_index
        args = args._replace(
            hidden_states=strided,
            steering_index=index[:, 1],
            steering_row_gate=gate[:, 1],
            steering_token_scales=tier[:, 2],
            steering_decode_mask=mask[:, 3],
        )
        check_steering(args, 3, in_place)
        idle = steering_case(7, 20, active=False, monitor=True, row_monitor=True)
        idle.steering_table.fill_(torch.nan)
        check_steering(idle, 3, in_place)
        empty = steering_case(0, 20, capacity=3)
        launch_apply_steering(empty, empty.hidden_states if in_place else torch.empty(0, 20))
    return 6


def monitor_cases() -> int:
    count = 0
    for number, (active, gate_rows) in enumerate(itertools.product([False, True], repeat=2)):
        for width in (1, 20, 128):
            args = monitor_case(7, width, capacity=9, active=active, gate_rows=gate_rows, seed=number)
            token_scales, row_gate = monitored(args)
            launch_steering_monitor(args, Launch(1 << (width - 1).bit_length(), 1, None, PROGRAMS[number % 5]))
            np.testing.assert_allclose(numpy64(args.steering_token_scales), token_scales, rtol=5e-6, atol=1e-7)
            np.testing.assert_allclose(numpy64(args.steering_row_gate), row_gate, rtol=5e-6, atol=1e-7)
            count += 1
    args = monitor_case(7, 20, active=True, gate_rows=True)
    expected = monitored(args)
    gate, tier, mask = (torch.full((7, stride), torch.nan) for stride in (2, 4, 5))
    gate[:, 1], tier[:, 2], mask[:, 3] = args.steering_row_gate, args.steering_token_scales, args.steering_decode_mask
    args = args._replace(
        steering_row_gate=gate[:, 1], steering_token_scales=tier[:, 2], steering_decode_mask=mask[:, 3]
    )
    launch_steering_monitor(args, Launch(32, 1, None, 3))
    for actual, wanted in zip((args.steering_token_scales, args.steering_row_gate), expected, strict=True):
        np.testing.assert_allclose(numpy64(actual), wanted, rtol=5e-6, atol=1e-7)
    launch_steering_monitor(monitor_case(0, 8))
    return count


if __name__ == "__main__":
    print(f"{steering_cases()} steering cases, {layouts()} layouts, {monitor_cases()} monitor cases equal the oracle")
