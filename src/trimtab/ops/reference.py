"""The meaning of trimtab's operators in plain torch: the truth that every backend is held to.

The functions are traceable: no data-dependent branch, no `.item()`, buffers are read as graph inputs. Called inside a
model's compiled graph they are the fastest backend, because the compiler fuses them into the neighbouring residual add
and norm; called eagerly they are the CPU's implementation. All arithmetic is float32 with one rounding at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.args import MonitorOpArgs, SteeringOpArgs, check_monitor_args, check_steering_args


class Terms(NamedTuple):
    """Which terms can be non-zero in an engine: constants of the trace, never data.

    The rows are always there. A term left out here costs nothing in the compiled graph, whatever its buffers hold.
    """

    tier: bool = True  # dynamic_vec * token_scales
    monitor: bool = True  # the site's own probe, fused
    row_monitor: bool = True  # a probe per row


ALL_TERMS = Terms()
ROWS_ONLY = Terms(tier=False, monitor=False, row_monitor=False)


def apply_steering(args: SteeringOpArgs, terms: Terms = ALL_TERMS) -> Tensor:
    """Steer `hidden_states`: a new contiguous [N, H] tensor of its dtype.

        out[i] = round(hidden[i] + table[r] * scales[r] * g + dynamic_vec * ts),    r = index[i]

    with `g` the row gate and `ts` the token scale, each multiplied by the monitors' gates (`steering_monitor` below has
    the formula; a row's own probe gates the row alone). Scores read the un-steered input. `any_active` is not read:
    routing a token to row 0 with a zero token scale is what leaves it as it is.

    Raises ValueError on shapes that no backend could read.
    """
    check_steering_args(args)
    hidden = args.hidden_states
    tokens = hidden.shape[0]
    rows = args.steering_index[:tokens]
    x = hidden.float()

    row_gain = args.steering_row_gate[:tokens]
    token_gain = args.steering_token_scales[:tokens]
    decode = args.steering_decode_mask[:tokens]
    if terms.monitor:
        gate = _gate(x, args.steering_monitor_probe, args.steering_monitor_params)
        gate = torch.where(args.steering_monitor_active, gate, 1.0)
        token_gain = token_gain * gate
        gates_rows = args.steering_monitor_params[2] != 0
        row_gain = row_gain * torch.where(gates_rows, _decode_only(gate, decode), 1.0)
    if terms.row_monitor and args.has_row_monitor:
        probes = args.steering_monitor_probe_table[rows].float()
        row_params = args.steering_monitor_row_params[rows]
        gate = torch.sigmoid(row_params[:, 1] * ((x * probes).sum(-1) - row_params[:, 0]))
        gate = torch.where(args.steering_monitor_row_active, gate, 1.0)
        row_gain = row_gain * _decode_only(gate, decode)
    row_gain = args.steering_scales[rows] * row_gain

    out = x + args.steering_table[rows].float() * row_gain[:, None]
    if terms.tier:
        out = out + args.steering_dynamic_vec.float() * token_gain[:, None]
    return out.to(hidden.dtype).contiguous()


def steering_monitor(args: MonitorOpArgs) -> None:
    """Multiply the site's gate into the first N per-token factors, in place.

        y = sigmoid(sharpness * (hidden[i] . probe - threshold))
        token_scales[i] *= y;    row_gate[i] *= m * y + (1 - m)  where gate_rows,    m = decode_mask[i]

    so a prefill token's row keeps its full strength. Nothing changes where `monitor_active` is False.
    """
    check_monitor_args(args)
    tokens = args.hidden_states.shape[0]
    gate = _gate(args.hidden_states.float(), args.probe, args.params)
    gate = torch.where(args.monitor_active, gate, 1.0)
    row_factor = torch.where(args.params[2] != 0, _decode_only(gate, args.steering_decode_mask[:tokens]), 1.0)
    args.steering_token_scales[:tokens].mul_(gate)
    args.steering_row_gate[:tokens].mul_(row_factor)


def _gate(x: Tensor, probe: Tensor, params: Tensor) -> Tensor:
    score = (x * probe.float()).sum(-1)  # a sum, not a matmul: it fuses, and no reduced-precision mode applies to it
    return torch.sigmoid(params[1] * (score - params[0]))


def _decode_only(gate: Tensor, decode: Tensor) -> Tensor:
    return decode * gate + (1.0 - decode)
