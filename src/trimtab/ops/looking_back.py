"""Responses that look at the stream as it was before any steering, in torch: what is done first, and last.

x   the full stream before anything of ours; y it with what was added, z it behind all slots
first:  y + sum over k of amount_k * (v_k - x) + sum over k of scale_k * |x| * w_k
last:   z * |x| / |z|
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.gather import table_rows
from trimtab.ops.responses import gated
from trimtab.responses import KEEP_NORM, NORM, REPLACE


class TokenSlots(NamedTuple):
    """The slots of each token's row at one site."""

    rows: Tensor  # [N, K, C] int64
    codes: Tensor  # [N, K, 2] int32
    params: Tensor  # [N, K, 10] float32
    mix: Tensor  # [N, K, K] float32
    gate_values: Tensor  # [G, T] float32


def begun(y: Tensor, x: Tensor, table: Tensor, slots: TokenSlots, names: Sequence[str]) -> Tensor:
    """`y` [N, H] float32 behind the responses of the first stage among `names`; `x` [N, H] is the full stream."""
    length = x.square().sum(-1).sqrt() if NORM.name in names else None
    numbers, taken = [], y.new_zeros(y.shape[0])
    for slot in range(slots.rows.shape[1]):
        code, gate = slots.codes[:, slot].unbind(-1)
        number = gated(slots.params[:, slot, 2], slots.gate_values, gate)
        c = torch.zeros_like(number)
        if length is not None:
            c = torch.where(code == NORM.code, number * length, c)
        if REPLACE.name in names:
            replaces = code == REPLACE.code
            taken = torch.where(replaces, taken + number, taken)
            c = torch.where(replaces, number, c)
        numbers.append(c * slots.mix[:, slot, slot])  # their own: no set holds them
    if REPLACE.name in names:  # a choice: 0 times infinity is no 0
        y = torch.where((taken > 0.0)[:, None], y - taken[:, None] * x, y)
    for slot, number in enumerate(numbers):
        y = y + table_rows(table, slots.rows[:, slot, 1]).float() * number[:, None]
    return y


def norm_kept(z: Tensor, x: Tensor, rest: Tensor | None, slots: TokenSlots) -> Tensor:
    """`z` [N, H] float32, with `rest` of the length of `x` where a slot says so; the same numbers where it has it."""
    stream = z if rest is None else z + rest.float()
    before, after = x.square().sum(-1).sqrt(), stream.square().sum(-1).sqrt()
    keeps = slots.codes[..., 0] == KEEP_NORM.code
    wanted = keeps.any(-1) & (after > 0.0)
    only_grown = (keeps & (slots.params[..., 2] > 0.0)).any(-1)
    wanted = wanted & torch.where(only_grown, after > before, after != before)
    kept = stream * torch.where(wanted, before / after, 1.0)[:, None]
    return torch.where(wanted[:, None], kept if rest is None else kept - rest.float(), z)
