"""The baseline of `ops.py`: a straightforward steering kernel, one program per token, three passes over its row.

Each pass walks the row in blocks of 2048: the global probe's score, the row probe's score, then the sum. Same arguments
and same arithmetic as ours; written here only to be measured against.
"""

import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops import SteeringOpArgs


def baseline_apply_steering(args: SteeringOpArgs, out: Tensor) -> None:
    """Write the steered `args.hidden_states` [N, H] to `out`."""
    tokens, width = args.hidden_states.shape
    _kernel[(tokens,)](
        *args,
        out,
        width,
        args.hidden_states.stride(0),
        args.steering_table.stride(0),
        args.steering_index.stride(0),
        args.steering_token_scales.stride(0),
        args.steering_row_gate.stride(0),
        args.steering_decode_mask.stride(0),
        args.steering_monitor_probe_table.stride(0),
        out.stride(0),
        BLOCK=min(2048, triton.next_power_of_2(width)),
    )


@triton.jit
def _kernel(
    hidden, table, index, any_active, scales, vec, token_scales, row_gate, probe, site_params, monitor_active,
    decode_mask, probe_table, row_params, row_active, out, width, hidden_s, table_s, index_s, tier_s, gate_s, decode_s,
    probe_s, out_s, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    x = hidden + token * hidden_s
    y = out + token * out_s
    if tl.load(any_active) == 0:
        for start in range(0, width, BLOCK):
            mask = start + lanes < width
            tl.store(y + start + lanes, tl.load(x + start + lanes, mask=mask), mask=mask)
    else:
        row = tl.load(index + token * index_s)
        gate = tl.load(row_gate + token * gate_s)
        tier = tl.load(token_scales + token * tier_s)
        decode = tl.load(decode_mask + token * decode_s)
        if tl.load(monitor_active) != 0:
            score = tl.zeros([BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                mask = start + lanes < width
                block = tl.load(x + start + lanes, mask=mask, other=0.0).to(tl.float32)
                score += block * tl.load(probe + start + lanes, mask=mask, other=0.0)
            opening = tl.sigmoid(tl.load(site_params + 1) * (tl.sum(score, 0) - tl.load(site_params)))
            tier *= opening
            if tl.load(site_params + 2) != 0.0:
                gate *= decode * opening + (1.0 - decode)
        if tl.load(row_active) != 0:
            score = tl.zeros([BLOCK], tl.float32)
            for start in range(0, width, BLOCK):
                mask = start + lanes < width
                block = tl.load(x + start + lanes, mask=mask, other=0.0).to(tl.float32)
                score += block * tl.load(probe_table + row * probe_s + start + lanes, mask=mask, other=0.0)
            threshold, sharpness = tl.load(row_params + 2 * row), tl.load(row_params + 2 * row + 1)
            opening = tl.sigmoid(sharpness * (tl.sum(score, 0) - threshold))
            gate *= decode * opening + (1.0 - decode)
        gate *= tl.load(scales + row)
        for start in range(0, width, BLOCK):
            mask = start + lanes < width
            block = tl.load(x + start + lanes, mask=mask, other=0.0).to(tl.float32)
            block += tl.load(table + row * table_s + start + lanes, mask=mask, other=0.0).to(tl.float32) * gate
            block += tl.load(vec + start + lanes, mask=mask, other=0.0) * tier
            tl.store(y + start + lanes, block.to(out.dtype.element_ty), mask=mask)
