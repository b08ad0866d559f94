"""Triton kernel of `trimtab::apply_steering`, out of place and in place.

A program takes one token at a time, so programs that run side by side work on memory side by side. A hidden row is
loaded once; it stays in registers, serves both probe scores, and becomes the result. What decides whether a token is
steered at all (the site's flag, the token's row, gate and token scale) is loaded first and together, and everything
else before anything waits: a token costs two dependent loads and a store, an unsteered one of the in-place form one
small load.
"""

import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.args import SteeringOpArgs
from trimtab.ops.kernels.common import decode_only, offset, opening
from trimtab.ops.kernels.launch import Launch, named_arguments, on_device, steering_launch_sizes
from trimtab.ops.variants import note_launch


def launch_apply_steering(args: SteeringOpArgs, out: Tensor, sizes: Launch | None = None) -> None:
    """Write the steered `args.hidden_states` to `out` [N, H], which may be `hidden_states` itself."""
    tokens, width = args.hidden_states.shape
    if tokens == 0 or width == 0:
        return
    sizes = sizes or steering_launch_sizes(args)
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
    token = tl.program_id(0)
    active = tl.load(p_any_active)
    i_row = tl.load(p_steering_index + offset(token, steering_index_stride_0)).to(tl.int32)
    tier = tl.load(p_steering_token_scales + offset(token, steering_token_scales_stride_0))
    gate = tl.load(p_steering_row_gate + offset(token, steering_row_gate_stride_0))
    monitor = tl.load(p_steering_monitor_active)
    if ROW_MONITOR:
        row_monitor = tl.load(p_steering_monitor_row_active)
    i_h = tl.arange(0, BLOCK)
    o_h = i_h.to(tl.int64)
    in_row = i_h < WIDTH
    more = True  # every program has a token
    if IN_PLACE:
        more = active  # an idle site leaves as soon as its flag is there
    while more:
        at_hidden = p_hidden_states + o_h * hidden_states_stride_1 + offset(token, hidden_states_stride_0)
        at_out = at_hidden
        if not IN_PLACE:  # every token is copied: start its load before what decides about steering has arrived
            at_out = p_out + o_h * out_stride_1 + offset(token, out_stride_0)
            b_hidden = tl.load(at_hidden, mask=in_row, other=0.0)
        if active & ((i_row != 0) | (tier != 0.0)):
            at_row = p_steering_table + o_h * steering_table_stride_1 + offset(i_row, steering_table_stride_0)
            b_row = tl.load(at_row, mask=in_row, other=0.0)
            if IN_PLACE:
                b_hidden = tl.load(at_hidden, mask=in_row, other=0.0)
            scale = tl.load(p_steering_scales + offset(i_row, steering_scales_stride_0))
            # A monitor reads the hidden row through a load of its own. The compiled program has only one, but without
            # the second in the source the compiler converts what the first brings too early: it would wait for it
            # before it starts the other loads.
            if ROW_MONITOR:
                at_probe = p_steering_monitor_probe_table + o_h * steering_monitor_probe_table_stride_1
                at_probe += offset(i_row, steering_monitor_probe_table_stride_0)
                b_probe = tl.load(at_probe, mask=in_row & row_monitor, other=0.0)
                at_params = p_steering_monitor_row_params + offset(i_row, steering_monitor_row_params_stride_0)
                at_sharpness = at_params + steering_monitor_row_params_stride_1
                at_decode = p_steering_decode_mask + offset(token, steering_decode_mask_stride_0)
                # Unmasked, these would start only inside the branch, after the row has come.
                threshold = tl.load(at_params, mask=row_monitor, other=0.0)
                sharpness = tl.load(at_sharpness, mask=row_monitor, other=0.0)
                decode = tl.load(at_decode, mask=row_monitor, other=0.0)
                if row_monitor:
                    b_scored = tl.load(at_hidden, mask=in_row, other=0.0).to(tl.float32)
                    y = opening(tl.sum(b_scored * b_probe.to(tl.float32), 0), threshold, sharpness)
                    gate *= decode_only(y, decode)
            if monitor:
                at_probe = p_steering_monitor_probe + o_h * steering_monitor_probe_stride_0
                b_probe = tl.load(at_probe, mask=in_row, other=0.0)
                threshold = tl.load(p_steering_monitor_params)
                sharpness = tl.load(p_steering_monitor_params + steering_monitor_params_stride_0)
                gate_rows = tl.load(p_steering_monitor_params + 2 * steering_monitor_params_stride_0) != 0.0
                decode = tl.load(p_steering_decode_mask + offset(token, steering_decode_mask_stride_0))
                b_scored = tl.load(at_hidden, mask=in_row, other=0.0).to(tl.float32)
                y = opening(tl.sum(b_scored * b_probe.to(tl.float32), 0), threshold, sharpness)
                tier *= y
                gate *= tl.where(gate_rows, decode_only(y, decode), 1.0)
            b_x = b_hidden.to(tl.float32) + b_row.to(tl.float32) * (scale * gate)
            if tier != 0.0:
                b_vec = tl.load(p_steering_dynamic_vec + o_h * steering_dynamic_vec_stride_0, mask=in_row, other=0.0)
                b_x += b_vec.to(tl.float32) * tier
            tl.store(at_out, b_x.to(p_out.dtype.element_ty), mask=in_row)
        elif not IN_PLACE:
            tl.store(at_out, b_hidden.to(p_out.dtype.element_ty), mask=in_row)
        token += tl.num_programs(0)
        more = token < tokens
        if more:
            i_row = tl.load(p_steering_index + offset(token, steering_index_stride_0)).to(tl.int32)
            tier = tl.load(p_steering_token_scales + offset(token, steering_token_scales_stride_0))
            gate = tl.load(p_steering_row_gate + offset(token, steering_row_gate_stride_0))
