"""Triton kernel of `trimtab::apply_gates_`: scores, factors, gains and gated sums of one site in one launch.

A program takes one token at a time. A token without gates costs the loads of its sites, and the gains that say so; one
whose gates have all their probes later in the model costs no row either. The stream is loaded only where a probe is
read.
"""

import triton
import triton.language as tl

from trimtab.ops.args import GateOpArgs
from trimtab.ops.kernels.launch import Launch, launch_sizes, named_arguments, on_device
from trimtab.ops.variants import note_launch


def launch_apply_gates(args: GateOpArgs, sizes: Launch | None = None) -> None:
    """Write the factors decided at this site, and all gains; add what gates let through to `args.steered`, if any."""
    tokens, width = args.hidden_states.shape
    if tokens == 0 or width == 0:
        return
    sizes = sizes or launch_sizes(width, tokens, args.hidden_states.device)
    with on_device(args.hidden_states):
        apply_gates_kernel[(sizes.programs,)](
            **named_arguments(apply_gates_kernel, args),
            tokens=tokens,
            WIDTH=width,
            BLOCK=sizes.block,
            GATES=args.gate_rows.shape[1],
            SPLIT=args.hidden_rest.shape[0] > 0,
            ADD=args.steered.shape[0] > 0,
            num_warps=sizes.num_warps,
            maxnreg=sizes.registers,
        )
    note_launch(apply_gates_kernel)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "tokens",
        "gate_rows_stride_0",
        "gate_rows_stride_1",
        "gate_probes_stride_0",
        "gate_probes_stride_1",
        "gate_sites_stride_0",
        "gate_sites_stride_1",
        "gate_params_stride_0",
        "gate_params_stride_1",
        "gate_params_stride_2",
        "gate_values_stride_0",
        "gate_values_stride_1",
        "gate_gains_stride_0",
        "gate_gains_stride_1",
        "gate_owns_stride_0",
        "gate_owns_stride_1",
    ],
    do_not_specialize_on_alignment=[
        "p_gate_rows",
        "p_gate_probes",
        "p_gate_sites",
        "p_gate_params",
        "p_gate_site",
        "p_gate_values",
        "p_gate_gains",
        "p_gate_owns",
    ],
)
def apply_gates_kernel(  # type: ignore[no-untyped-def]
    p_steered,
    p_hidden_states,
    p_hidden_rest,
    p_steering_table,
    p_gate_rows,
    p_gate_probes,
    p_gate_sites,
    p_gate_params,
    p_gate_probe_table,
    p_gate_site,
    p_gate_values,
    p_gate_gains,
    p_gate_owns,
    tokens,
    steered_stride_0,
    steered_stride_1,
    hidden_states_stride_0,
    hidden_states_stride_1,
    hidden_rest_stride_0,
    hidden_rest_stride_1,
    steering_table_stride_0,
    steering_table_stride_1,
    gate_rows_stride_0,
    gate_rows_stride_1,
    gate_probes_stride_0,
    gate_probes_stride_1,
    gate_sites_stride_0,
    gate_sites_stride_1,
    gate_params_stride_0,
    gate_params_stride_1,
    gate_params_stride_2,
    gate_probe_table_stride_0,
    gate_probe_table_stride_1,
    gate_values_stride_0,
    gate_values_stride_1,
    gate_gains_stride_0,
    gate_gains_stride_1,
    gate_owns_stride_0,
    gate_owns_stride_1,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATES: tl.constexpr,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
):
    here = tl.load(p_gate_site)
    o_h = tl.arange(0, BLOCK).to(tl.int64)
    in_row = o_h < WIDTH
    for i_token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        o_token = tl.cast(i_token, tl.int64)
        at_sites = p_gate_sites + o_token * gate_sites_stride_0
        at_gains = p_gate_gains + o_token * gate_gains_stride_1
        probing = False
        acting = False
        for slot in tl.static_range(GATES):
            site = tl.load(at_sites + slot * gate_sites_stride_1)
            decided = (site > 0) & (site <= here)
            tl.store(at_gains + slot * gate_gains_stride_0, 0.0, mask=decided == 0)
            probing = probing | (site == here)
            acting = acting | (decided if ADD else site == here)
        if acting:
            at_out = p_steered + o_token * steered_stride_0
            if ADD:
                b_out = tl.load(at_out + o_h * steered_stride_1, mask=in_row, other=0.0).to(tl.float32)
            b_x = tl.load(
                p_hidden_states + o_token * hidden_states_stride_0 + o_h * hidden_states_stride_1,
                mask=o_h < tl.where(probing, WIDTH, 0),
                other=0.0,
            ).to(tl.float32)
            if SPLIT:
                b_x += tl.load(
                    p_hidden_rest + o_token * hidden_rest_stride_0 + o_h * hidden_rest_stride_1,
                    mask=o_h < tl.where(probing, WIDTH, 0),
                    other=0.0,
                ).to(tl.float32)
            for slot in tl.static_range(GATES):
                site = tl.load(at_sites + slot * gate_sites_stride_1)
                if (site > 0) & (site <= here):
                    at_gain = at_gains + slot * gate_gains_stride_0
                    gain = tl.load(at_gain)
                    if site == here:
                        at_params = p_gate_params + o_token * gate_params_stride_0 + slot * gate_params_stride_1
                        threshold = tl.load(at_params + gate_params_stride_2)
                        sharpness = tl.load(at_params + 2 * gate_params_stride_2)
                        invert = tl.load(at_params + 3 * gate_params_stride_2)
                        i_probe = tl.load(p_gate_probes + o_token * gate_probes_stride_0 + slot * gate_probes_stride_1)
                        b_probe = tl.load(
                            p_gate_probe_table
                            + i_probe.to(tl.int64) * gate_probe_table_stride_0
                            + o_h * gate_probe_table_stride_1,
                            mask=in_row,
                            other=0.0,
                        )
                        score = tl.sum(b_x * b_probe, 0)
                        soft = tl.sigmoid(sharpness * (score - threshold))
                        y = tl.where(sharpness > 0.0, soft, tl.where(score > threshold, 1.0, 0.0))
                        factor = tl.where(invert > 0.0, 1.0 - y, y)
                        at_value = p_gate_values + o_token * gate_values_stride_1
                        if slot > 0:
                            join = tl.load(at_params + 4 * gate_params_stride_2)
                            if join != 0.0:
                                tl.store(p_gate_owns + slot * gate_owns_stride_0 + o_token * gate_owns_stride_1, factor)
                                tl.debug_barrier()  # the gate before it may have been decided above, by one thread
                                joined = tl.load(at_value + (slot - 1) * gate_values_stride_0)
                                factor = tl.where(join > 0.0, factor * joined, factor + joined * (1.0 - factor))
                        tl.store(at_value + slot * gate_values_stride_0, factor)
                        gain = tl.load(at_params) * factor
                        tl.store(at_gain, gain)
                    if ADD:
                        o_row = tl.load(p_gate_rows + o_token * gate_rows_stride_0 + slot * gate_rows_stride_1)
                        b_row = tl.load(
                            p_steering_table + o_row * steering_table_stride_0 + o_h * steering_table_stride_1,
                            mask=in_row,
                            other=0.0,
                        )
                        b_out += b_row.to(tl.float32) * gain
            if ADD:
                tl.store(at_out + o_h * steered_stride_1, b_out.to(p_steered.dtype.element_ty), mask=in_row)
