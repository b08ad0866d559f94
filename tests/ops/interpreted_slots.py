"""Runs the slots' kernel in Triton's interpreter against the oracle. A program: `python interpreted_slots.py`.

The interpreter replaces `triton.jit` while Triton is imported, so it cannot share a process with compiled kernels.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from slots_cases import after, slotted

from trimtab.ops.kernels.apply_slots import launch_apply_slots
from trimtab.ops.kernels.launch import Launch


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
    expected = after(args)
    case.buffers.slots.slab[:, 0] = 1  # record 0 and row 0, which nobody must load
    case.buffers.table[:, 0] = float("nan")
    block = 1 << (width - 1).bit_length()
    launch_apply_slots(args, Launch(max(1, block // (1, 4)[number // 4 % 2]), 1, None, (1, 3, 7)[number % 3]))
    tolerance = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[steered.dtype]  # it rounds toward zero
    np.testing.assert_allclose(steered.double().numpy(), expected, rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    for number in range(60):
        check(number)
    print("60 slot cases equal the oracle")
