"""Runs the slots' kernel in Triton's interpreter against the oracle. A program: `python interpreted_slots.py`.

The interpreter replaces `triton.jit` while Triton is imported, so it cannot share a process with compiled kernels.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parents[1]))

import itertools
from itertools import product
from unittest import mock

import numpy as np
import patched_interpreter  # noqa: F401
import torch
from slots_cases import assert_noted, explained, slotted

from trimtab.ops.args import SlotOpArgs
from trimtab.ops.kernels.apply_slots import launch_apply_slots
from trimtab.ops.kernels.launch import Launch
from trimtab.responses import KEEP_NORM, REPLACE


def check(number: int) -> None:
    """The number chooses width, dtype, slots, gates, programs, pieces of a row, a split stream, and its layout."""
    width, slots = (1, 20, 33, 128)[number % 4], 1 + number % 5
    dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
    back = number % 7 in (1, 3, 4)
    writes = number % 3 > 0 or back
    case = slotted(
        7, width, slots=slots, gates=(0, 2)[number % 2], writes=writes, dtype=dtype, seed=number, looks_back=back
    )
    random = torch.Generator().manual_seed(number)
    steered, hidden, rest = (torch.randn(7, 2 * width, generator=random).to(dtype)[:, :: 1 + i] for i in (1, 1, 0))
    rest = rest[:, :width] if number % 2 else None
    steered = steered.float() if back else steered  # as it then is in service, between tensors of the model's dtype
    wild = [token for token in range(7) if case.buffers.index[token] == 0]
    steered[wild] = float("nan")
    args = case.args(steered, rest, hidden)
    expected, told = explained(args)
    case.buffers.slots.slab[:, 0] = 1  # record 0 and row 0, which nobody must load
    case.buffers.table[:, 0] = float("nan")
    block = 1 << (width - 1).bit_length()
    launch_apply_slots(args, Launch(max(1, block // (1, 4)[number // 4 % 2]), 1, None, (1, 3, 7)[number % 3]))
    tolerance = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[steered.dtype]  # it rounds toward zero
    np.testing.assert_allclose(steered.double().numpy(), expected, rtol=tolerance, atol=tolerance)
    assert_noted(args, told, rtol=1e-3, atol=1e-4)


def looking(width: int, code: int, number: float, *, split: bool) -> tuple[SlotOpArgs, Launch]:
    """Seven tokens of one row whose only slot is of `code`, which takes `number`; they are read in pieces."""
    case = slotted(7, width, slots=2, seed=width, looks_back=True)
    state = case.buffers.slots
    case.buffers.index.fill_(1)
    for part in (state.rows, state.codes, state.params, state.mix):
        part[0, 1] = 0
    state.rows[0, 1, 0, 1] = 2 if code == REPLACE.code else 0
    state.codes[0, 1, 0, 0], state.params[0, 1, 0, 2], state.mix[0, 1, 0, 0] = code, number, 1.0
    hidden, rest = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(width)) * 1e3
    args = case.args(hidden.clone(), rest if split else None, hidden)
    return args, Launch(32, 1, None, 7)


def check_replaced(width: int, *, split: bool) -> None:
    """All of a token is replaced, infinite numbers and NaN too."""
    args, launch = looking(width, REPLACE.code, 1.0, split=split)
    for tensor in (args.steered, args.hidden_states):
        tensor[0, 0], tensor[1], tensor[2, -1] = float("inf"), float("nan"), -float("inf")
    launch_apply_slots(args, launch)
    stream = args.steered + (args.hidden_rest if split else 0.0)
    np.testing.assert_allclose(stream, args.steering_table[2].float().expand_as(stream), rtol=1e-5, atol=1e-3)


def check_untouched(width: int, *, split: bool) -> None:
    """A token with which nothing was done keeps its numbers, however its norms are summed; another keeps its norm.

    Here both sums are taken alike, so the last root of a token's three is made to differ by a rounding, as on a GPU.
    """
    args, launch = looking(width, KEEP_NORM.code, 0.0, split=split)
    args.steered[3:] *= 1.5
    root, turn = np.sqrt, itertools.cycle(np.array([1.0, 1.0, 1.000001], np.float32))
    with mock.patch.object(np, "sqrt", lambda value: root(value) * next(turn)):
        launch_apply_slots(args, launch)
    assert torch.equal(args.steered[:3], args.hidden_states[:3])
    rest = args.hidden_rest if split else 0.0
    lengths = [torch.linalg.vector_norm(part[3:] + rest[3:] if split else part[3:], dim=-1) for part in args[:2]]
    torch.testing.assert_close(*lengths, rtol=1e-5, atol=0.0)


if __name__ == "__main__":
    for number in range(60):
        check(number)
    with np.errstate(invalid="ignore"):
        for width, split in product((1, 33, 128, 500), (False, True)):
            check_replaced(width, split=split)
            check_untouched(width, split=split)
    print("60 slot cases equal the oracle")
