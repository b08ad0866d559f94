"""Triton kernel of `trimtab::steering_monitor`: one probe score per token, multiplied into the per-token factors.

A program takes one token at a time. Tokens on which the gate can act nowhere (no tier, and a row that is not gated) are
passed over without loading their row.
"""

import triton
import triton.language as tl

from trimtab.ops.args import MonitorOpArgs
from trimtab.ops.kernels.common import decode_only, opening
from trimtab.ops.kernels.launch import Launch, launch_sizes, named_arguments, on_device
from trimtab.ops.variants import note_launch


def launch_steering_monitor(args: MonitorOpArgs, sizes: Launch | None = None) -> None:
    """Multiply the site's gate into `args.steering_token_scales` and `args.steering_row_gate`."""
    tokens, width = args.hidden_states.shape
    if tokens == 0:
        return
    sizes = sizes or launch_sizes(width, tokens, args.hidden_states.device)
    with on_device(args.hidden_states):
        steering_monitor_kernel[(sizes.programs,)](
            **named_arguments(steering_monitor_kernel, args),
            tokens=tokens,
            WIDTH=width,
            BLOCK=sizes.block,
            num_warps=sizes.num_warps,
            maxnreg=sizes.registers,
        )
    note_launch(steering_monitor_kernel)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "tokens",
        "params_stride_0",
        "steering_token_scales_stride_0",
        "steering_decode_mask_stride_0",
        "steering_row_gate_stride_0",
    ],
    do_not_specialize_on_alignment=[
        "p_params",
        "p_monitor_active",
        "p_steering_token_scales",
        "p_steering_decode_mask",
        "p_steering_row_gate",
    ],
)
def steering_monitor_kernel(  # type: ignore[no-untyped-def]
    p_hidden_states,
    p_probe,
    p_params,
    p_monitor_active,
    p_steering_token_scales,
    p_steering_decode_mask,
    p_steering_row_gate,
    tokens,
    hidden_states_stride_0,
    hidden_states_stride_1,
    probe_stride_0,
    params_stride_0,
    steering_token_scales_stride_0,
    steering_decode_mask_stride_0,
    steering_row_gate_stride_0,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    active = tl.load(p_monitor_active)
    threshold = tl.load(p_params)
    sharpness = tl.load(p_params + params_stride_0)
    gate_rows = tl.load(p_params + 2 * params_stride_0) != 0.0
    end = tl.where(active, tokens, 0)  # an idle site walks no token

    o_h = tl.arange(0, BLOCK).to(tl.int64)
    in_row = o_h < WIDTH
    for number in range(tl.program_id(0), end, tl.num_programs(0)):
        i_token = tl.cast(number, tl.int64)
        at_tier = p_steering_token_scales + i_token * steering_token_scales_stride_0
        at_gate = p_steering_row_gate + i_token * steering_row_gate_stride_0
        decode = tl.load(p_steering_decode_mask + i_token * steering_decode_mask_stride_0)
        tier = tl.load(at_tier)
        gate = tl.load(at_gate)
        if (tier != 0.0) | (gate_rows & (decode != 0.0)):
            at_hidden = p_hidden_states + i_token * hidden_states_stride_0
            b_x = tl.load(at_hidden + o_h * hidden_states_stride_1, mask=in_row, other=0.0).to(tl.float32)
            b_probe = tl.load(p_probe + o_h * probe_stride_0, mask=in_row, other=0.0).to(tl.float32)
            y = opening(tl.sum(b_x * b_probe, 0), threshold, sharpness)
            tl.store(at_tier, tier * y)
            if gate_rows:
                tl.store(at_gate, gate * decode_only(y, decode))
