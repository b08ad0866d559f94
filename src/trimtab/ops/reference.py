"""The meaning of trimtab's operators in plain torch: the truth that every backend is held to.

The functions are traceable: no data-dependent branch, no `.item()`, buffers are read as graph inputs. Called inside a
model's compiled graph they are the fastest backend, because the compiler fuses them into the neighbouring residual add
and norm; called eagerly they are the CPU's implementation. All arithmetic is float32 with one rounding at the end.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.args import (
    NO_THRESHOLD,
    SLOT_ROWS,
    GateOpArgs,
    MonitorOpArgs,
    SlotForm,
    SteeringOpArgs,
    check_monitor_args,
    check_steering_args,
)
from trimtab.ops.gather import stored, table_numbers, table_rows
from trimtab.ops.looking_back import TokenSlots, begun, norm_kept
from trimtab.ops.responses import gated, respond
from trimtab.responses import DIGITS, RESPONSES, Stage, of_stage


class Terms(NamedTuple):
    """Which terms can be non-zero in an engine: constants of the trace, never data.

    The rows are always there. A term left out here costs nothing in the compiled graph, whatever its buffers hold.
    """

    tier: bool = True  # dynamic_vec * token_scales
    monitor: bool = True  # the site's own probe, fused
    row_monitor: bool = True  # a probe per row
    row_scales: bool = True  # scales[r]; without them every row counts once, whatever they hold


ALL_TERMS = Terms()
# What the engines trace: the runtime keeps a row's scale in its tokens' row gates and leaves the row scales at 1.
ROWS_ONLY = Terms(tier=False, monitor=False, row_monitor=False, row_scales=False)


class Gates(NamedTuple):
    """The gated rows of each token, decided by `decide_gates` at this site or an earlier one."""

    rows: Tensor  # [T, G] int64
    gains: Tensor  # [G, T] float32


class Slots(NamedTuple):
    """The slots of each row at one site: `SlotOpArgs` without the stream."""

    table: Tensor  # [R, H] model dtype
    token_rows: Tensor  # [T] int64
    rows: Tensor  # [R, K, C] int64
    codes: Tensor  # [R, K, 2] int32
    params: Tensor  # [R, K, 10] float32
    mix: Tensor  # [R, K, K] float32
    gate_values: Tensor  # [G, T] float32
    corrections: Sequence[Tensor]  # of each slot [T] float32, written


def apply_steering(
    args: SteeringOpArgs, terms: Terms = ALL_TERMS, gates: Gates | None = None, rest: Tensor | None = None
) -> Tensor:
    """Steer `hidden_states`: a new contiguous [N, H] tensor of its dtype.

        out[i] = round(hidden[i] + table[r] * scales[r] * g + dynamic_vec * ts),    r = index[i]

    with `g` the row gate and `ts` the token scale, each multiplied by the monitors' gates (`steering_monitor` below has
    the formula; a row's own probe gates the row alone). Scores read the un-steered input; with `rest` [N, H], its sum
    with that. `any_active` is not read: routing a token to row 0 with a zero token scale is what leaves it as it is.
    `gates` adds `add_gated`, unrounded.

    Raises ValueError on shapes that no backend could read.
    """
    return add_steering(args, terms, gates, rest).to(args.hidden_states.dtype).contiguous()


def add_steering(
    args: SteeringOpArgs, terms: Terms = ALL_TERMS, gates: Gates | None = None, rest: Tensor | None = None
) -> Tensor:
    """What `apply_steering` rounds: [N, H] float32."""
    check_steering_args(args)
    hidden = args.hidden_states
    tokens = hidden.shape[0]
    rows = args.steering_index[:tokens]
    x = hidden.float()
    scored = x if rest is None else x + rest.float()

    row_gain = args.steering_row_gate[:tokens]
    token_gain = args.steering_token_scales[:tokens]
    decode = args.steering_decode_mask[:tokens]
    if terms.monitor:
        gate = _gate(scored, args.steering_monitor_probe, args.steering_monitor_params)
        gate = torch.where(args.steering_monitor_active, gate, 1.0)
        token_gain = token_gain * gate
        gates_rows = args.steering_monitor_params[2] != 0
        row_gain = row_gain * torch.where(gates_rows, _decode_only(gate, decode), 1.0)
    if terms.row_monitor and args.has_row_monitor:
        row_params = args.steering_monitor_row_params[rows]
        probed = torch.where(row_params[:, 0] != NO_THRESHOLD, rows, 0)  # a row without a probe has none to read
        probes = table_rows(args.steering_monitor_probe_table, probed).float()
        gate = torch.sigmoid(row_params[:, 1] * ((scored * probes).sum(-1) - row_params[:, 0]))
        gate = torch.where(args.steering_monitor_row_active, gate, 1.0)
        row_gain = row_gain * _decode_only(gate, decode)
    if terms.row_scales:
        row_gain = args.steering_scales[rows] * row_gain

    out = x + table_rows(args.steering_table, rows).float() * row_gain[:, None]
    if terms.tier:
        out = out + args.steering_dynamic_vec.float() * token_gain[:, None]
    if gates is not None:
        out = add_gated(out, args.steering_table, gates)
    return out


def add_gated(out: Tensor, table: Tensor, gates: Gates) -> Tensor:
    """`out` [N, H] float32 plus, for each gate of token i, table[row] * gain."""
    tokens = out.shape[0]
    for slot, gain in enumerate(gates.gains.unbind(0)):
        out = out + table_rows(table, gates.rows[:tokens, slot]).float() * gain[:tokens, None]
    return out


def apply_slots(
    y: Tensor, slots: Slots, form: SlotForm, rest: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """`y` [N, H] float32, to which all has been added, with what the slots of each token's row make of it, unrounded.

        u_k = (y[i] . table[read_k]) * factor_k + bias_k,    bias_k where the slot reads nothing
        c_k = response_k(u_k) * gate_k,    response_k(u_k, u_j) where it sees the score of another slot j too
        z[i] = y[i] + sum over k of (sum over j of mix[k, j] * c_j) * table[write_k],    table[read_k] where that is 0

    Where the form `reads_float32`, what slot k reads is table[read_k] + 2^-8 table[middle_k] + 2^-16 table[low_k]. c_k
    goes to `corrections` too, for receipts. All slots read the same y; with `rest` [N, H], its sum with that. The
    responses are those of `form`; before and behind them come those that look at `hidden` [N, H], what `y` was before
    anything was added (`ops.looking_back`).
    A token whose row has no slots keeps its numbers, infinite ones and NaN too.

    Raises ValueError where the form looks back and `hidden` is None.
    """
    tokens = y.shape[0]
    token_rows = slots.token_rows[:tokens]
    rows, codes, params, mix = (
        table_numbers(part.flatten(1), token_rows).view(tokens, *part.shape[1:])
        for part in (slots.rows, slots.codes, slots.params, slots.mix)
    )
    own = TokenSlots(rows, codes, params, mix, slots.gate_values)
    if not form.looks_back:
        z, numbers = _locally(y, slots.table, own, form, rest)
        _note(numbers, slots.corrections)
        return z
    if hidden is None:
        raise ValueError(f"the responses {', '.join(form.responses)} need the stream before any steering")
    x = hidden.float() if rest is None else hidden.float() + rest.float()
    done: list[list[Tensor]] = []
    if first := of_stage(form.responses, Stage.FIRST):
        y, numbers = begun(y, x, rest, slots.table, own, first)
        done.append(numbers)
    z = y
    if of_stage(form.responses, Stage.LOCAL):
        z, numbers = _locally(y, slots.table, own, form, rest)
        done.append(numbers)
    if done:  # a slot has one stage; what keeps norms corrects nothing
        _note([sum(each[1:], start=each[0]) for each in zip(*done, strict=True)], slots.corrections)
    return norm_kept(z, hidden, rest, own) if of_stage(form.responses, Stage.LAST) else z


def _note(numbers: Sequence[Tensor], corrections: Sequence[Tensor]) -> None:
    """Keep what each slot did, in a tensor for each: a compiler writes to one in place where nothing else is in it."""
    for c, kept in zip(numbers, corrections, strict=True):
        kept[: c.shape[0]].copy_(c)


def _locally(
    y: Tensor, table: Tensor, slots: TokenSlots, form: SlotForm, rest: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """`y` with what slots make of it whose responses are local, and c of each slot; 0 of another stage's."""
    names = of_stage(form.responses, Stage.LOCAL)
    rows, codes, params, mix, gate_values = slots
    stream = y if rest is None else y + rest.float()
    scores, written = [], []
    for slot in range(form.count):
        read, (factor, bias, *_) = rows[:, slot, 0], params[:, slot].unbind(-1)
        along = table_rows(table, read).float()
        if form.reads_float32:
            for place, row in enumerate(rows[:, slot, SLOT_ROWS:].unbind(-1), start=1):
                along = along + table_rows(table, row).float() * 2.0 ** (-DIGITS * place)
        score = (stream * along).sum(-1)
        scores.append(torch.where(read > 0, score * factor, 0.0) + bias)  # a choice: 0 times infinity is no 0
    for slot, u in enumerate(scores):
        code = codes[:, slot, 0]
        c = respond(names, code, u, params[:, slot, 2:].unbind(-1), scores)
        if form.looks_back:  # a slot of another stage is none here
            mine = [code == RESPONSES[name].code for name in names]
            c = torch.where(functools.reduce(torch.logical_or, mine), c, 0.0)
        written.append(gated(c, gate_values, codes[:, slot, 1]))
    z = y
    for slot in range(form.count):
        along, other = rows[:, slot, 0], rows[:, slot, 1]
        if form.writes:
            along = torch.where(other > 0, other, along)
        amount = sum((mix[:, slot, j] * c for j, c in enumerate(written)), start=torch.zeros_like(written[0]))
        z = z + table_rows(table, along).float() * stored(amount)[:, None]
    return z, written


def decide_gates(stream: Tensor, args: GateOpArgs) -> None:
    """Write the factors of gates whose probe is at this site, and the gains of all gates of the first N tokens.

        y = sigmoid(sharpness * (stream[i] . probe - threshold)), or stream[i] . probe > threshold where sharpness is 0
        own = 1 - y where inverted, else y
        factor = own, or joined to that of the gate before it: own * before ("all"), own + before * (1 - own) ("any")
        gain = coefficient * factor

    `stream` [N, H] float32 is the full stream before any steering here. Of a gate whose probe is at an earlier site the
    factor is the one written there; of all others the gain is 0, whatever the buffers held.
    """
    tokens, here = stream.shape[0], args.gate_site
    factors = args.gate_values[:, :tokens]
    written = zip(factors.unbind(0), args.gate_gains[:, :tokens], args.gate_owns[:, :tokens], strict=True)
    for slot, (factor, gain, alone) in enumerate(written):
        site = args.gate_sites[:tokens, slot]
        coefficient, threshold, sharpness, invert, join = args.gate_params[:tokens, slot].unbind(-1)
        at_probe = site == here
        probe = args.gate_probe_table[torch.where(at_probe, args.gate_probes[:tokens, slot], 0)]
        score = (stream * probe).sum(-1)
        y = torch.where(sharpness > 0, torch.sigmoid(sharpness * (score - threshold)), (score > threshold).float())
        own = torch.where(invert > 0, 1.0 - y, y)
        before = factors[max(slot - 1, 0)]  # of the first, which is joined to none, nothing is taken
        both = torch.where(join > 0, own * before, own + before * (1.0 - own))
        alone.copy_(torch.where(at_probe & (join != 0), own, alone))
        factor.copy_(torch.where(at_probe, torch.where(join != 0, both, own), factor))
        gain.copy_(coefficient * torch.where((site > 0) & (site <= here), factor, 0.0))


def steering_monitor(args: MonitorOpArgs, terms: Terms = ALL_TERMS) -> None:
    """Multiply the site's gate into the first N per-token factors, in place.

        y = sigmoid(sharpness * (hidden[i] . probe - threshold))
        token_scales[i] *= y;    row_gate[i] *= m * y + (1 - m)  where gate_rows,    m = decode_mask[i]

    so a prefill token's row keeps its full strength. Nothing changes where `monitor_active` is False, nor for a token
    whose scale and mask are 0, whatever its hidden state: padding may hold anything, and factors outlast a step.
    """
    check_monitor_args(args)
    tokens = args.hidden_states.shape[0]
    gate = _gate(args.hidden_states.float(), args.probe, args.params)
    gate = torch.where(args.monitor_active, gate, 1.0)
    decode = args.steering_decode_mask[:tokens]
    gates_row = (args.params[2] != 0) & (decode != 0)
    args.steering_row_gate[:tokens].mul_(torch.where(gates_row, _decode_only(gate, decode), 1.0))
    if terms.tier:
        scales = args.steering_token_scales[:tokens]
        scales.mul_(torch.where(scales != 0, gate, 1.0))


def _gate(x: Tensor, probe: Tensor, params: Tensor) -> Tensor:
    score = (x * probe.float()).sum(-1)  # a sum, not a matmul: it fuses, and no reduced-precision mode applies to it
    return torch.sigmoid(params[1] * (score - params[0]))


def _decode_only(gate: Tensor, decode: Tensor) -> Tensor:
    return decode * gate + (1.0 - decode)
