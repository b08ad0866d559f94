"""Triton kernel of `trimtab::apply_steering`, out of place and in place.

A program takes a run of neighbouring tokens, one after the other. It loads a token's hidden row once; that stays in
registers, serves both probe scores, and becomes the result. Neighbours mostly belong to one request and so to one row
of the table, which a program then finds in its multiprocessor's own cache. What decides whether a token is steered at
all (the site's flag, the token's row, gate and token scale) is loaded first and together, and everything else before
anything waits: a token costs two dependent loads and a store, an unsteered one of the in-place form one small load.
"""

import triton
import triton.language as tl
from torch import Tensor

from trimtab.ops.args import SteeringOpArgs
from trimtab.ops.kernels.common import decode_only, opening
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
            tokens_each=tokens // sizes.programs,
            longer_programs=tokens % sizes.programs,
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
        "tokens_each",
        "longer_programs",
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
    tokens_each,
    longer_programs,
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
    program = tl.program_id(0)
    first = program * tokens_each + tl.minimum(program, longer_programs)
    count = tokens_each + (program < longer_programs).to(tl.int32)
    o_token = first.to(tl.int64)
    active = tl.load(p_any_active)
    i_row = tl.load(p_steering_index + o_token * steering_index_stride_0).to(tl.int32)
    gate = tl.load(p_steering_row_gate + o_token * steering_row_gate_stride_0)
    tier = tl.load(p_steering_token_scales + o_token * steering_token_scales_stride_0)
    monitor = tl.load(p_steering_monitor_active)
    if ROW_MONITOR:
        row_monitor = tl.load(p_steering_monitor_row_active)
    i_h = tl.arange(0, BLOCK)
    o_h = i_h.to(tl.int64)
    in_row = i_h < WIDTH
    # Twice the same code: for the one token that a program has in small batches, without what a loop has to prepare,
    # and for many. In place, an idle site runs neither.
    for MANY in tl.static_range(2):
        wanted = count > 1 if MANY else count == 1
        if IN_PLACE:
            wanted = wanted & active & ((count > 1) | (i_row != 0) | (tier != 0.0))
        if wanted:
            for i_step in range(0, count if MANY else 1):
                if MANY:
                    o_next = tl.cast(first + i_step + 1, tl.int64)
                    more = i_step + 1 < count
                    at_next = p_steering_index + o_next * steering_index_stride_0
                    next_row = tl.load(at_next, mask=more, other=0).to(tl.int32)
                    at_next = p_steering_row_gate + o_next * steering_row_gate_stride_0
                    next_gate = tl.load(at_next, mask=more, other=0.0)
                    at_next = p_steering_token_scales + o_next * steering_token_scales_stride_0
                    next_tier = tl.load(at_next, mask=more, other=0.0)
                o_token = tl.cast(first + i_step, tl.int64)
                o_row = i_row.to(tl.int64)
                at_hidden = p_hidden_states + o_token * hidden_states_stride_0 + o_h * hidden_states_stride_1
                at_out = p_out + o_token * out_stride_0
                at_table = p_steering_table + o_row * steering_table_stride_0 + o_h * steering_table_stride_1
                at_decode = p_steering_decode_mask + o_token * steering_decode_mask_stride_0
                # Zero, which the compiler cannot know: addresses of vectors that all tokens share would otherwise take
                # registers all the time, and there are too few. (Times 16, so that it keeps alignments.)
                zero = tl.minimum(i_row, 0) * 16
                steer = active & ((i_row != 0) | (tier != 0.0))
                if not IN_PLACE:  # every token is copied: start its load before what decides about steering has arrived
                    b_hidden = tl.load(at_hidden, mask=in_row, other=0.0, eviction_policy="evict_first")
                if steer:
                    if IN_PLACE:
                        b_hidden = tl.load(at_hidden, mask=in_row, other=0.0, eviction_policy="evict_first")
                    b_row = tl.load(at_table, mask=in_row, other=0.0)
                    scale = tl.load(p_steering_scales + o_row * steering_scales_stride_0)
                    if ROW_MONITOR:
                        at_params = p_steering_monitor_row_params + o_row * steering_monitor_row_params_stride_0
                        row_threshold = tl.load(at_params)
                        row_sharpness = tl.load(at_params + steering_monitor_row_params_stride_1)
                        at_probe = p_steering_monitor_probe_table + o_row * steering_monitor_probe_table_stride_0
                        b_row_probe = tl.load(
                            at_probe + o_h * steering_monitor_probe_table_stride_1,
                            mask=i_h < tl.where(row_monitor, WIDTH, 0),
                            other=0.0,
                        )
                    # Float32 copies of the hidden row are made where they are used: made here, they would wait for it.
                    if monitor:
                        at_probe = p_steering_monitor_probe + zero
                        b_probe = tl.load(at_probe + o_h * steering_monitor_probe_stride_0, mask=in_row, other=0.0)
                        decode = tl.load(at_decode)
                        threshold = tl.load(p_steering_monitor_params)
                        sharpness = tl.load(p_steering_monitor_params + steering_monitor_params_stride_0)
                        gate_rows = tl.load(p_steering_monitor_params + 2 * steering_monitor_params_stride_0) != 0.0
                        y = opening(tl.sum(b_hidden.to(tl.float32) * b_probe.to(tl.float32), 0), threshold, sharpness)
                        tier = tier * y
                        gate = gate * tl.where(gate_rows, decode_only(y, decode), 1.0)
                    if ROW_MONITOR:
                        decode = tl.load(at_decode)
                        if row_monitor:
                            score = tl.sum(b_hidden.to(tl.float32) * b_row_probe.to(tl.float32), 0)
                            gate = gate * decode_only(opening(score, row_threshold, row_sharpness), decode)
                    # after the scores: it comes from a near cache, and registers are scarce above
                    at_vec = p_steering_dynamic_vec + zero
                    b_vec = tl.load(
                        at_vec + o_h * steering_dynamic_vec_stride_0,
                        mask=i_h < tl.where(tier != 0.0, WIDTH, 0),
                        other=0.0,
                    )
                    gain = scale * gate
                    b_x = (b_hidden.to(tl.float32) + b_row.to(tl.float32) * gain) + b_vec.to(tl.float32) * tier
                    tl.store(at_out + o_h * out_stride_1, b_x.to(p_out.dtype.element_ty), mask=in_row)
                elif not IN_PLACE:
                    tl.store(at_out + o_h * out_stride_1, b_hidden.to(p_out.dtype.element_ty), mask=in_row)
                if MANY:
                    i_row = next_row
                    gate = next_gate
                    tier = next_tier
