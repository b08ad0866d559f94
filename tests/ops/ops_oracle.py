"""The operators' formulas once more, in float64 NumPy and token by token: what every backend is compared with."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trimtab.ops.args import MonitorOpArgs, SteeringOpArgs

Array = npt.NDArray[np.float64]

# One rounding to the model dtype is half a unit in the last place (2**-24, 2**-11 and 2**-9 relative, the last two
# doubled because a float32 error may tip a tie). The absolute part covers the float32 error of the sum and of the
# gates, which does not shrink where terms cancel.
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-5},
    torch.float16: {"rtol": 2**-10, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-5},
}


def numpy64(tensor: Tensor) -> Array:
    return tensor.detach().cpu().double().numpy()


def sigmoid(z: float) -> float:
    return 1.0 / (1.0 + np.exp(-z)) if z >= 0 else np.exp(z) / (1.0 + np.exp(z))


def steered(args: SteeringOpArgs) -> Array:
    """What apply_steering must return, before rounding, in float64."""
    a: Any = SteeringOpArgs(*[numpy64(t) for t in args])  # type: ignore[arg-type]
    hidden = a.hidden_states
    if not args.any_active.item():
        return hidden
    out = np.empty_like(hidden)
    for i in range(hidden.shape[0]):
        r = int(args.steering_index[i])
        ts, g, m = a.steering_token_scales[i], a.steering_row_gate[i], a.steering_decode_mask[i]
        if a.steering_monitor_active[0]:
            threshold, sharpness, gate_rows = a.steering_monitor_params[:3]
            y = sigmoid(sharpness * (hidden[i] @ a.steering_monitor_probe - threshold))
            ts = ts * y
            if gate_rows:
                g = g * (m * y + (1 - m))
        if a.steering_monitor_row_active[0] and a.steering_monitor_probe_table.shape == a.steering_table.shape:
            threshold, sharpness = a.steering_monitor_row_params[r]
            y = sigmoid(sharpness * (hidden[i] @ a.steering_monitor_probe_table[r] - threshold))
            g = g * (m * y + (1 - m))
        out[i] = hidden[i] + a.steering_table[r] * a.steering_scales[r] * g + a.steering_dynamic_vec * ts
    return out


def monitored(args: MonitorOpArgs) -> tuple[Array, Array]:
    """What steering_monitor must leave in (token_scales, row_gate), in float64."""
    a: Any = MonitorOpArgs(*[numpy64(t) for t in args])  # type: ignore[arg-type]
    token_scales, row_gate = a.steering_token_scales.copy(), a.steering_row_gate.copy()
    if args.monitor_active.item():
        threshold, sharpness, gate_rows = a.params[:3]
        for i in range(a.hidden_states.shape[0]):
            y = sigmoid(sharpness * (a.hidden_states[i] @ a.probe - threshold))
            m = a.steering_decode_mask[i]
            token_scales[i] *= y
            if gate_rows:
                row_gate[i] *= m * y + (1 - m)
    return token_scales, row_gate


def assert_steered(actual: Tensor, args: SteeringOpArgs, *, rounds_toward_zero: bool = False) -> None:
    """Compare with the float64 value, to the tolerance of the model dtype.

    `rounds_toward_zero` doubles the relative part: Triton's interpreter converts to bfloat16 by truncation.
    """
    tolerance = dict(TOLERANCE[args.hidden_states.dtype])
    if rounds_toward_zero:
        tolerance["rtol"] *= 2
    np.testing.assert_allclose(numpy64(actual), steered(args), **tolerance)
