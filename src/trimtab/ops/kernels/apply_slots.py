"""Triton kernel of `trimtab::apply_slots_`: all slots of one site in one launch, in place.

A program takes one token at a time. A token whose row has no slot here costs the loads that tell. For another, all K
rows that its slots read are on their way at once, and so are those that they write; where K rows are more than fits in
registers, in pieces of their width. The source loads the stream twice, the compiled program once where there is one
piece. Where responses look back, what comes first is made of each piece again wherever it is needed, and the last loop
runs twice: the length of what comes out is known behind the first.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from trimtab.ops import looking_back
from trimtab.ops.args import SLOT_PARAMS, SLOT_ROWS, SlotOpArgs
from trimtab.ops.kernels.launch import Launch, launch_sizes, named_arguments, on_device
from trimtab.ops.kernels.responses import (
    KEEP_NORM_CODE,
    NORM_CODE,
    REPLACE_CODE,
    SEES_TWO,
    respond,
    respond_to_feature,
    respond_to_two,
)
from trimtab.ops.variants import note_launch
from trimtab.responses import DIGITS

ALL = tl.constexpr(looking_back.ALL)
LAST = tl.constexpr(SLOT_PARAMS - 1)  # where the place of a second score stands
SHARE = tl.constexpr(2.0**-DIGITS)  # the unit of a row of digits in that of the one before it

HELD = 16384
"""Elements that a program holds at once of what its slots read; half as many where the numbers of more than 4 slots, or
what is known of more than one piece, leave less room."""


def slot_launch_sizes(
    width: int, slots: int, tokens: int, device: torch.device, looks_back: bool = False, reads_float32: bool = False
) -> Launch:
    """The launch for N `tokens` of `width` H with K `slots`: a thread holds 32 elements or less, 8 where it looks back
    or reads to the digits of float32, which take more of each, and fewer warps share a piece where it does both.
    """
    lines, takes_more = triton.next_power_of_2(slots), looks_back + reads_float32
    held = HELD if lines <= 4 and lines * width <= HELD else HELD // 2
    if takes_more:
        held = (HELD if lines <= 4 else HELD // 2) // (4 * takes_more)
    sizes = launch_sizes(min(width, max(1, held // lines)), tokens, device)
    per_warp = 256 if takes_more else 1024
    return dataclasses.replace(sizes, num_warps=max(sizes.num_warps, lines * sizes.block // per_warp))


def launch_apply_slots(args: SlotOpArgs, sizes: Launch | None = None) -> None:
    """Write what each token's slots make of the stream to `args.steered`."""
    tokens, width = args.steered.shape
    if tokens == 0 or width == 0:
        return
    slots = args.slot_rows.shape[1]
    looks_back = args.hidden_states.shape[0] > 0
    float32 = args.slot_rows.shape[2] > SLOT_ROWS
    sizes = sizes or slot_launch_sizes(width, slots, tokens, args.steered.device, looks_back, float32)
    with on_device(args.steered):
        apply_slots_kernel[(sizes.programs,)](
            **named_arguments(apply_slots_kernel, args),
            tokens=tokens,
            WIDTH=width,
            BLOCK=sizes.block,
            SLOTS=slots,
            LINES=triton.next_power_of_2(slots),
            SPLIT=args.hidden_rest.shape[0] > 0,
            GATED=args.gate_values.shape[0] > 0,
            BACK=looks_back,
            FLOAT32=float32,
            num_warps=sizes.num_warps,
            maxnreg=sizes.registers,
        )
    note_launch(apply_slots_kernel)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "tokens",
        "steering_index_stride_0",
        "slot_rows_stride_0",
        "slot_rows_stride_1",
        "slot_rows_stride_2",
        "slot_codes_stride_0",
        "slot_codes_stride_1",
        "slot_codes_stride_2",
        "slot_params_stride_0",
        "slot_params_stride_1",
        "slot_params_stride_2",
        "slot_mix_stride_0",
        "slot_mix_stride_1",
        "slot_mix_stride_2",
        "gate_values_stride_0",
        "gate_values_stride_1",
        "slot_corrections_stride_0",
        "slot_corrections_stride_1",
    ],
    do_not_specialize_on_alignment=[
        "p_steering_index",
        "p_slot_rows",
        "p_slot_codes",
        "p_slot_params",
        "p_slot_mix",
        "p_gate_values",
        "p_slot_corrections",
    ],
)
def apply_slots_kernel(  # type: ignore[no-untyped-def]
    p_steered,
    p_hidden_states,
    p_hidden_rest,
    p_steering_table,
    p_steering_index,
    p_slot_rows,
    p_slot_codes,
    p_slot_params,
    p_slot_mix,
    p_gate_values,
    p_slot_corrections,
    tokens,
    steered_stride_0,
    steered_stride_1,
    hidden_states_stride_0,
    hidden_states_stride_1,
    hidden_rest_stride_0,
    hidden_rest_stride_1,
    steering_table_stride_0,
    steering_table_stride_1,
    steering_index_stride_0,
    slot_rows_stride_0,
    slot_rows_stride_1,
    slot_rows_stride_2,
    slot_codes_stride_0,
    slot_codes_stride_1,
    slot_codes_stride_2,
    slot_params_stride_0,
    slot_params_stride_1,
    slot_params_stride_2,
    slot_mix_stride_0,
    slot_mix_stride_1,
    slot_mix_stride_2,
    gate_values_stride_0,
    gate_values_stride_1,
    slot_corrections_stride_0,
    slot_corrections_stride_1,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    LINES: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    BACK: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    i_slot = tl.arange(0, LINES)
    is_slot = i_slot < SLOTS
    for i_token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        o_token = tl.cast(i_token, tl.int64)
        o_record = tl.load(p_steering_index + o_token * steering_index_stride_0)
        steered = is_slot & (o_record > 0)
        at_rows = p_slot_rows + o_record * slot_rows_stride_0 + i_slot * slot_rows_stride_1
        o_read = tl.load(at_rows, mask=steered, other=0)
        o_write = tl.load(at_rows + slot_rows_stride_2, mask=steered, other=0)
        if FLOAT32:  # rows with the other digits of what is read
            o_middle = tl.load(at_rows + 2 * slot_rows_stride_2, mask=steered, other=0)
            o_low = tl.load(at_rows + 3 * slot_rows_stride_2, mask=steered, other=0)
        if (LINES > 1) != (BACK and FLOAT32):  # which width spills no register was tried out, for each form
            o_read, o_write = o_read.to(tl.int32), o_write.to(tl.int32)
        acting = o_read | o_write
        if BACK:  # one that keeps the norm has no direction
            at_stages = p_slot_codes + o_record * slot_codes_stride_0 + i_slot * slot_codes_stride_1
            acting |= tl.load(at_stages, mask=steered, other=0)
        if tl.max(acting, 0) > 0:
            at_codes = p_slot_codes + o_record * slot_codes_stride_0 + i_slot * slot_codes_stride_1
            at_params = p_slot_params + o_record * slot_params_stride_0 + i_slot * slot_params_stride_1
            at_mix = p_slot_mix + o_record * slot_mix_stride_0 + i_slot[:, None] * slot_mix_stride_1
            code = tl.load(at_codes, mask=is_slot, other=0)
            factor = tl.load(at_params, mask=is_slot, other=0.0)
            bias = tl.load(at_params + slot_params_stride_2, mask=is_slot, other=0.0)
            b_mix = tl.load(
                at_mix + i_slot[None, :] * slot_mix_stride_2, mask=is_slot[:, None] & is_slot[None, :], other=0.0
            )
            opened = tl.full([LINES], 1.0, tl.float32)
            if GATED:
                gate = tl.load(at_codes + slot_codes_stride_2, mask=is_slot, other=0)
                at_gates = p_gate_values + (gate - 1).to(tl.int64) * gate_values_stride_0
                opened = tl.load(at_gates + o_token * gate_values_stride_1, mask=gate > 0, other=1.0)

            if BACK:
                before = tl.cast(0.0, tl.float32)
                for start in range(0, WIDTH, BLOCK):
                    o_h = start + tl.arange(0, BLOCK).to(tl.int64)
                    in_row = o_h < WIDTH
                    at_hidden = p_hidden_states + o_token * hidden_states_stride_0 + o_h * hidden_states_stride_1
                    b_x = tl.load(at_hidden, mask=in_row, other=0.0).to(tl.float32)
                    if SPLIT:
                        at_rest = p_hidden_rest + o_token * hidden_rest_stride_0 + o_h * hidden_rest_stride_1
                        b_x += tl.load(at_rest, mask=in_row, other=0.0).to(tl.float32)
                    before += tl.sum(b_x * b_x, 0)
                before = tl.sqrt(before)
                number = tl.load(at_params + 2 * slot_params_stride_2, mask=is_slot, other=0.0)
                shares = tl.where(code == REPLACE_CODE, number * opened, 0.0)
                taken = tl.sum(shares, 0)
                firsts = tl.where(code == NORM_CODE, number * opened * before, shares)
                first_amount = tl.sum(b_mix * firsts[None, :], 1)
                o_first = tl.where((code == REPLACE_CODE) | (code == NORM_CODE), o_write, 0)
                keeps = tl.max(tl.where(code == KEEP_NORM_CODE, 1, 0), 0) > 0
                only_grown = tl.max(tl.where((code == KEEP_NORM_CODE) & (number > 0.0), 1, 0), 0) > 0

            score = tl.zeros([LINES], tl.float32)
            b_held = tl.zeros([BLOCK], p_steered.dtype.element_ty)  # the piece, where there is one
            for start in range(0, WIDTH, BLOCK):
                o_h = start + tl.arange(0, BLOCK).to(tl.int64)
                in_row = o_h < WIDTH
                at_steered = p_steered + o_token * steered_stride_0 + o_h * steered_stride_1
                b_held = tl.load(at_steered, mask=in_row, other=0.0)
                b_y = b_held.to(tl.float32)
                if SPLIT:
                    at_rest = p_hidden_rest + o_token * hidden_rest_stride_0 + o_h * hidden_rest_stride_1
                    b_rest = tl.load(at_rest, mask=in_row, other=0.0).to(tl.float32)
                    b_y += b_rest
                if BACK:
                    at_hidden = p_hidden_states + o_token * hidden_states_stride_0 + o_h * hidden_states_stride_1
                    b_x = tl.load(at_hidden, mask=in_row, other=0.0).to(tl.float32)
                    if SPLIT:
                        b_x += b_rest
                    at_first = p_steering_table + o_first[:, None].to(tl.int64) * steering_table_stride_0
                    b_first = tl.load(
                        at_first + o_h[None, :] * steering_table_stride_1,
                        mask=(o_first > 0)[:, None] & in_row[None, :],
                        other=0.0,
                    )
                    b_y = begun(b_y, b_x, 0.0, taken, first_amount, b_first)
                at_read = p_steering_table + o_read[:, None].to(tl.int64) * steering_table_stride_0
                b_read = tl.load(
                    at_read + o_h[None, :] * steering_table_stride_1,
                    mask=(o_read > 0)[:, None] & in_row[None, :],
                    other=0.0,
                )
                b_read = b_read.to(tl.float32)
                if FLOAT32:
                    at_middle = p_steering_table + o_middle[:, None] * steering_table_stride_0
                    b_middle = tl.load(
                        at_middle + o_h[None, :] * steering_table_stride_1,
                        mask=(o_middle > 0)[:, None] & in_row[None, :],
                        other=0.0,
                    )
                    at_low = p_steering_table + o_low[:, None] * steering_table_stride_0
                    b_low = tl.load(
                        at_low + o_h[None, :] * steering_table_stride_1,
                        mask=(o_low > 0)[:, None] & in_row[None, :],
                        other=0.0,
                    )
                    b_read += (b_middle.to(tl.float32) + b_low.to(tl.float32) * SHARE) * SHARE
                score += tl.sum(b_y[None, :] * b_read, 1)

            u = tl.where(o_read > 0, score * factor, 0.0) + bias
            at_numbers = at_params + 2 * slot_params_stride_2
            c = respond(code, u, at_numbers, slot_params_stride_2, is_slot)
            if tl.max(code, 0) >= SEES_TWO:
                place = tl.load(at_params + LAST * slot_params_stride_2, mask=is_slot, other=0.0).to(tl.int32)
                v = tl.sum(tl.where(place[:, None] == i_slot[None, :], u[None, :], 0.0), 1)
                c = respond_to_two(c, code, u, v, at_numbers, slot_params_stride_2, is_slot)
            if FLOAT32:
                c = respond_to_feature(c, code, u, at_numbers, slot_params_stride_2)
            c *= opened
            # Here, so that nothing is held for it; behind a store a compiler loads anew what is not in `b_held`.
            at_corrections = p_slot_corrections + i_slot.to(tl.int64) * slot_corrections_stride_0
            tl.store(at_corrections + o_token * slot_corrections_stride_1, c + firsts if BACK else c, mask=is_slot)
            amount = tl.sum(b_mix * c[None, :], 1)
            o_along = tl.where(o_write > 0, o_write, o_read)
            kept = tl.cast(1.0, tl.float32)
            for i_pass in tl.static_range(1 if BACK else 0, -1, -1):
                after = tl.cast(0.0, tl.float32)
                changed = tl.cast(0, tl.int32)
                for start in range(0, WIDTH, BLOCK):
                    o_h = start + tl.arange(0, BLOCK).to(tl.int64)
                    in_row = o_h < WIDTH
                    at_steered = p_steered + o_token * steered_stride_0 + o_h * steered_stride_1
                    at_along = p_steering_table + o_along[:, None].to(tl.int64) * steering_table_stride_0
                    b_along = tl.load(
                        at_along + o_h[None, :] * steering_table_stride_1,
                        mask=(o_along > 0)[:, None] & in_row[None, :],
                        other=0.0,
                    )
                    if BLOCK < WIDTH or BACK:
                        b_z = tl.load(at_steered, mask=in_row, other=0.0).to(tl.float32)
                    else:
                        b_z = b_held.to(tl.float32)
                    if BACK:
                        b_rest = tl.zeros([BLOCK], tl.float32)
                        if SPLIT:
                            at_rest = p_hidden_rest + o_token * hidden_rest_stride_0 + o_h * hidden_rest_stride_1
                            b_rest = tl.load(at_rest, mask=in_row, other=0.0).to(tl.float32)
                        at_hidden = p_hidden_states + o_token * hidden_states_stride_0 + o_h * hidden_states_stride_1
                        b_hidden = tl.load(at_hidden, mask=in_row, other=0.0).to(tl.float32)
                        firsts_here = tl.where(o_first > 0, first_amount, 0.0)
                        b_z = begun(b_z, b_hidden + b_rest, -b_rest, taken, firsts_here, b_along)
                    b_z += tl.sum(amount[:, None] * b_along.to(tl.float32), 0)
                    if i_pass == 1:
                        after += tl.sum((b_z + b_rest) * (b_z + b_rest), 0)
                        changed = tl.maximum(changed, tl.max(tl.where(b_z != b_hidden, 1, 0), 0))
                    else:
                        if BACK:
                            b_z = tl.where(kept == 1.0, b_z, (b_z + b_rest) * kept - b_rest)
                        tl.store(at_steered, b_z.to(p_steered.dtype.element_ty), mask=in_row)
                if i_pass == 1:
                    after = tl.sqrt(after)
                    wanted = keeps & (changed > 0) & (after > 0.0) & (before < float("inf"))
                    wanted &= (after > before) | ((after != before) & (only_grown == 0))
                    kept = tl.where(wanted, before / after, 1.0)


@triton.jit
def begun(b_y, b_x, b_gone, taken, amount, b_first):  # type: ignore[no-untyped-def]
    """A piece of the stream, x before any steering and y with all that is added, behind the responses that act first.

    `taken` is the share of x that goes, `amount` [LINES] how much of the rows `b_first` [LINES, BLOCK] comes; `b_gone`
    is what y is where all of an infinite x, or of NaN, is gone.
    """
    b_y = tl.where(taken > 0.0, b_y - taken * b_x, b_y)
    b_y = tl.where(tl.abs(b_x) < float("inf"), b_y, tl.where(taken >= ALL, b_gone, b_y))
    return b_y + tl.sum(amount[:, None] * b_first.to(tl.float32), 0)
