"""Triton kernel of `trimtab::apply_steering`, out of place and in place.

A program takes one token at a time. It loads that token's row once; the row stays in registers, serves both probe
scores in one reduction, and becomes the result. What decides whether a token is steered at all (the site's flag, the
token's row, gate and token scale) is loaded first and together, so a token costs two dependent loads and a store, and
an unsteered one of the in-place form a single small load.
"""

import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.args import SteeringOpArgs
from trimtab.ops.kernels.common import add_pairs, decode_only, opening
from trimtab.ops.kernels.launch import Launch, launch_sizes, named_arguments, on_device
from trimtab.ops.variants import note_launch


def launch_apply_steering(args: SteeringOpArgs, out: Tensor, sizes: Launch | None = None) -> None:
    """Write the steered `args.hidden_states` to `out` [N, H], which may be `hidden_states` itself."""
    tokens, width = args.hidden_states.shape
    if tokens == 0 or width == 0:
        return
    sizes = sizes or launch_sizes(width, tokens, args.hidden_states.device)
    with on_device(args.hidden_states):
        apply_steering_kernel[(sizes.programs,)](
            **named_arguments(apply_steering_kernel, args, out=out),
            tokens=tokens,
            WIDTH=width,
            BLOCK=sizes.block,
            IN_PLACE=out is args.hidden_states,
            ROW_MONITOR=args.has_row_monitor,
            num_warps=sizes.num_warps,
            maxnreg=sizes.registers,
        )
    note_launch(apply_steering_kernel)


# Only what shapes the code of a row's loads may select a variant: row pointers, row strides, the width. Token counts,
# strides of per-token buffers and alignment of flags do not.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "tokens",
        "steering_index_stride_0",
        "steering_scales_stride_0",
        "steering_token_scales_stride_0",
        "steering_row_gate_stride_0",
        "steering_decode_mask_stride_0",
        "steering_monitor_params_stride_0",
        "steering_monitor_row_params_stride_0",
        "steering_monitor_row_params_stride_1",
    ],
    do_not_specialize_on_alignment=[
        "p_steering_index",
        "p_any_active",
        "p_steering_scales",
        "p_steering_token_scales",
        "p_steering_row_gate",
        "p_steering_monitor_params",
        "p_steering_monitor_active",
        "p_steering_decode_mask",
        "p_steering_monitor_row_params",
        "p_steering_monitor_row_active",
    ],
)
def apply_steering_kernel(  # type: ignore[no-untyped-def]
    p_hidden_states,
    p_steering_table,
    p_steering_index,
    p_any_active,
    p_steering_scales,
    p_steering_dynamic_vec,
    p_steering_token_scales,
    p_steering_row_gate,
    p_steering_monitor_probe,
    p_steering_monitor_params,
    p_steering_monitor_active,
    p_steering_decode_mask,
    p_steering_monitor_probe_table,
    p_steering_monitor_row_params,
    p_steering_monitor_row_active,
    p_out,
    tokens,
    hidden_states_stride_0,
    hidden_states_stride_1,
    steering_table_stride_0,
    steering_table_stride_1,
    steering_index_stride_0,
    steering_scales_stride_0,
    steering_dynamic_vec_stride_0,
    steering_token_scales_stride_0,
    steering_row_gate_stride_0,
    steering_monitor_probe_stride_0,
    steering_monitor_params_stride_0,
    steering_decode_mask_stride_0,
    steering_monitor_probe_table_stride_0,
    steering_monitor_probe_table_stride_1,
    steering_monitor_row_params_stride_0,
    steering_monitor_row_params_stride_1,
    out_stride_0,
    out_stride_1,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROW_MONITOR: tl.constexpr,
):
    # Numbers of tokens and rows stay 32-bit in registers; every offset made of them is 64-bit.
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    o_token = first.to(tl.int64)
    active = tl.load(p_any_active)
    i_row = tl.load(p_steering_index + o_token * steering_index_stride_0).to(tl.int32)
    gate = tl.load(p_steering_row_gate + o_token * steering_row_gate_stride_0)
    tier = tl.load(p_steering_token_scales + o_token * steering_token_scales_stride_0)
    monitor = tl.load(p_steering_monitor_active)
    if ROW_MONITOR:
        row_monitor = tl.load(p_steering_monitor_row_active)
    end = tokens
    if IN_PLACE:
        end = tl.where(active, tokens, 0)  # an idle site walks no token

    o_h = tl.arange(0, BLOCK).to(tl.int64)
    in_row = o_h < WIDTH
    for i_token in range(first, end, programs):
        i_next = i_token + programs
        more = i_next < end
        o_next = tl.cast(i_next, tl.int64)
        next_row = tl.load(p_steering_index + o_next * steering_index_stride_0, mask=more, other=0).to(tl.int32)
        next_gate = tl.load(p_steering_row_gate + o_next * steering_row_gate_stride_0, mask=more, other=0.0)
        next_tier = tl.load(p_steering_token_scales + o_next * steering_token_scales_stride_0, mask=more, other=0.0)

        o_token = tl.cast(i_token, tl.int64)
        o_row = i_row.to(tl.int64)
        at_hidden = p_hidden_states + o_token * hidden_states_stride_0
        at_out = p_out + o_token * out_stride_0
        at_table = p_steering_table + o_row * steering_table_stride_0
        at_probe = p_steering_monitor_probe_table + o_row * steering_monitor_probe_table_stride_0
        steer = active & ((i_row != 0) | (tier != 0.0))
        if not IN_PLACE:  # every token is copied: start its load before what decides about steering has arrived
            b_hidden = tl.load(at_hidden + o_h * hidden_states_stride_1, mask=in_row, other=0.0)
        if steer:
            if IN_PLACE:
                b_hidden = tl.load(at_hidden + o_h * hidden_states_stride_1, mask=in_row, other=0.0)
            scale = tl.load(p_steering_scales + o_row * steering_scales_stride_0)
            b_x = b_hidden.to(tl.float32)
            b_row = tl.load(at_table + o_h * steering_table_stride_1, mask=in_row, other=0.0)
            scored = monitor
            if ROW_MONITOR:
                scored = monitor | row_monitor
            if scored:
                decode = tl.load(p_steering_decode_mask + o_token * steering_decode_mask_stride_0)
                threshold = tl.load(p_steering_monitor_params)
                sharpness = tl.load(p_steering_monitor_params + steering_monitor_params_stride_0)
                gate_rows = tl.load(p_steering_monitor_params + 2 * steering_monitor_params_stride_0) != 0.0
                b_probe = tl.load(
                    p_steering_monitor_probe + o_h * steering_monitor_probe_stride_0,
                    mask=o_h < tl.where(monitor, WIDTH, 0),
                    other=0.0,
                ).to(tl.float32)
                if ROW_MONITOR:
                    at_params = p_steering_monitor_row_params + o_row * steering_monitor_row_params_stride_0
                    row_threshold = tl.load(at_params)
                    row_sharpness = tl.load(at_params + steering_monitor_row_params_stride_1)
                    b_row_probe = tl.load(
                        at_probe + o_h * steering_monitor_probe_table_stride_1,
                        mask=o_h < tl.where(row_monitor, WIDTH, 0),
                        other=0.0,
                    ).to(tl.float32)
                    score, row_score = tl.reduce((b_x * b_probe, b_x * b_row_probe), 0, add_pairs)
                else:
                    score = tl.sum(b_x * b_probe, 0)
                y = opening(score, threshold, sharpness, monitor)
                tier = tier * y
                gate = gate * tl.where(gate_rows, decode_only(y, decode), 1.0)
                if ROW_MONITOR:
                    y = opening(row_score, row_threshold, row_sharpness, row_monitor)
                    gate = gate * decode_only(y, decode)
            # after the scores: one vector for all tokens, so it comes from a near cache, and registers are scarce above
            b_vec = tl.load(
                p_steering_dynamic_vec + o_h * steering_dynamic_vec_stride_0,
                mask=o_h < tl.where(tier != 0.0, WIDTH, 0),
                other=0.0,
            )
            gain = scale * gate
            b_out = (b_x + b_row.to(tl.float32) * gain) + b_vec.to(tl.float32) * tier
            b_hidden = b_out.to(p_out.dtype.element_ty)
            if IN_PLACE:
                tl.store(at_out + o_h * out_stride_1, b_hidden, mask=in_row)
        if not IN_PLACE:
            tl.store(at_out + o_h * out_stride_1, b_hidden, mask=in_row)
        i_row = next_row
        gate = next_gate
        tier = next_tier
