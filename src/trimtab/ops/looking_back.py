"""Responses that look at the stream as it was before any steering, in torch: what is done first, and last.

x   the full stream before anything of ours; y it with what was added, z it behind all slots
first:  y + sum over k of amount_k * (v_k - x) + sum over k of scale_k * |x| * w_k
last:   z * |x| / |z|

Where amounts are all of the stream, it does not matter what x was, infinite or NaN neither. What was added to such a
number cannot be told from it, and goes with it. A token with which nothing was done keeps its numbers to the bit,
however its norms were summed, and a norm that is not finite is not kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.ops.gather import table_rows
from trimtab.ops.responses import gated
from trimtab.responses import KEEP_NORM, NORM, REPLACE

ALL = 1.0 - 1e-6
"""The sum of amounts from which on nothing of the stream is left: each is rounded to float32."""


class TokenSlots(NamedTuple):
    """The slots of each token's row at one site."""

    rows: Tensor  # [N, K, C] int64
    codes: Tensor  # [N, K, 2] int32
    params: Tensor  # [N, K, 10] float32
    mix: Tensor  # [N, K, K] float32
    gate_values: Tensor  # [G, T] float32


def begun(
    y: Tensor, x: Tensor, rest: Tensor | None, table: Tensor, slots: TokenSlots, names: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """`y` [N, H] float32 behind the responses of the first stage among `names`, and c [N] of each slot, 0 of another
    stage's; `x` [N, H] is the full stream, of which `rest` [N, H] is no part of `y`.
    """
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
        numbers.append(c)
    if REPLACE.name in names:  # a choice: 0 times infinity is no 0
        y = torch.where((taken > 0.0)[:, None], y - taken[:, None] * x, y)
        gone = torch.zeros_like(y) if rest is None else -rest.float()
        y = torch.where((taken >= ALL)[:, None] & ~(x.abs() < torch.inf), gone, y)
    for slot, c in enumerate(numbers):
        amount = c * slots.mix[:, slot, slot]  # their own: no set holds them
        y = y + table_rows(table, slots.rows[:, slot, 1]).float() * amount[:, None]
    return y, numbers


def norm_kept(z: Tensor, hidden: Tensor, rest: Tensor | None, slots: TokenSlots) -> Tensor:
    """`z` [N, H] float32, with `rest` as long as `hidden` is with it where a slot says so; as it is where z is `hidden`
    [N, H], or as long."""
    x = hidden.float() if rest is None else hidden.float() + rest.float()
    stream = z if rest is None else z + rest.float()
    before, after = x.square().sum(-1).sqrt(), stream.square().sum(-1).sqrt()
    keeps = slots.codes[..., 0] == KEEP_NORM.code
    changed = (z != hidden.float()).any(-1)
    wanted = keeps.any(-1) & changed & (after > 0.0) & (before < torch.inf)
    only_grown = (keeps & (slots.params[..., 2] > 0.0)).any(-1)
    wanted = wanted & torch.where(only_grown, after > before, after != before)
    kept = stream * torch.where(wanted, before / after, 1.0)[:, None]
    return torch.where(wanted[:, None], kept if rest is None else kept - rest.float(), z)
