"""Runs the gates' kernel in Triton's interpreter against the oracle. A program: `python interpreted_gates.py`.

The interpreter replaces `triton.jit` while Triton is imported, so it cannot share a process with compiled kernels.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import patched_interpreter  # noqa: F401
import torch
from gates_cases import SITES, Oracle, gated_stack

from trimtab.ops.kernels.apply_gates import launch_apply_gates
from trimtab.ops.kernels.launch import Launch

joined: set[float] = set()  # how gates were joined in all cases


def check(number: int) -> None:
    """Three sites in a row; the number chooses width, dtype, number of gates and programs, and a split stream."""
    width, gates = (1, 20, 33, 128)[number % 4], 1 + number % 4
    dtype = (torch.float32, torch.float16, torch.bfloat16)[number % 3]
    split = number % 2 == 0
    stack = gated_stack(7, width, gates=gates, dtype=dtype, seed=number)
    gates_state = stack.buffers.gates
    gates_state.values.fill_(float("nan"))
    gates_state.gains.fill_(float("nan"))
    gates_state.owns.fill_(-1.0)
    only_decide = number % 5 == 4
    oracle, rng = Oracle(stack), torch.Generator().manual_seed(number)
    for place in range(len(SITES)):
        hidden, rest, steered = (torch.randn(7, width, generator=rng).to(dtype) for _ in range(3))
        before = steered.double().numpy()
        launch = Launch(1 << (width - 1).bit_length(), 1, None, (1, 3, 7)[number % 3])
        target = steered[:0] if only_decide else steered
        launch_apply_gates(stack.args(place, target, hidden, rest if split else None), launch)
        stream = hidden.double().numpy() + (rest.double().numpy() if split else 0.0)
        expected = before + oracle.added(place, stream)
        sure = [token for token in range(7) if token not in oracle.near]
        tolerance = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]  # it rounds toward zero
        if only_decide:
            expected = before
        np.testing.assert_allclose(steered.double().numpy()[sure], expected[sure], rtol=tolerance, atol=tolerance)
        for token, slot in np.ndindex(7, gates):
            coefficient, factor = oracle.params[token, slot, 0], oracle.factors.get((token, slot), 0.0)
            if token not in oracle.near:
                gain = gates_state.gains[slot, token].item()
                np.testing.assert_allclose(gain, coefficient * factor, atol=4e-5)
    assert oracle.factors
    for (token, slot), factor in oracle.factors.items():
        if token not in oracle.near:
            np.testing.assert_allclose(gates_state.values[slot, token].item(), factor, atol=2e-5)
    for token, slot in np.ndindex(7, gates):
        if token not in oracle.near:
            own = gates_state.owns[slot, token].item()
            np.testing.assert_allclose(own, oracle.owns.get((token, slot), -1.0), atol=2e-5)
    joined.update(float(oracle.params[key][4]) for key in oracle.owns if key[0] not in oracle.near)


if __name__ == "__main__":
    for number in range(24):
        check(number)
    assert joined == {-1.0, 1.0}
    print("24 gate cases equal the oracle")
