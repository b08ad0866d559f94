"""Random slots on random tokens, and their meaning in float64: what the tests of `apply_slots_` share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from response_formulas import FORMULAS
from trimtab.ops import SlotForm, SteeringBuffers, slot_op_args
from trimtab.ops.args import SlotOpArgs
from trimtab.responses import FEATURE, KEEP_NORM, NORM, REPLACE, RESPONSES, TURN, Stage, of_stage
from trimtab.sites import HookPoint, Site

POST = HookPoint.POST_BLOCK
SITE = Site(0, POST)
LOCAL = of_stage(RESPONSES, Stage.LOCAL)
BACK = tuple(name for name in RESPONSES if name not in LOCAL)
RESPONSE_OF = {response.code: name for name, response in RESPONSES.items()}
Array = npt.NDArray[np.float64]


@dataclass
class Slotted:
    """One site of an engine on a module, with random directions, slots and tokens."""

    buffers: SteeringBuffers
    module: nn.Module
    tokens: int

    def args(self, steered: Tensor, rest: Tensor | None = None, hidden: Tensor | None = None) -> SlotOpArgs:
        return slot_op_args(self.module, POST, steered, rest, hidden)


def slotted(
    tokens: int,
    width: int,
    *,
    slots: int = 2,
    rows: int = 7,
    gates: int = 0,
    writes: bool = True,
    responses: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
    looks_back: bool = False,
) -> Slotted:
    """A third of the slots are none, bounds are infinite as often as not, sets mix, some slots read nothing; where the
    form looks back, half of them do.

    Responses are drawn from `responses`, by default all local ones that the form can have; second scores from the slots
    of the row.
    """
    if responses is None:
        responses = tuple(name for name in LOCAL if writes or not RESPONSES[name].reads_float32)
    rng = np.random.default_rng(seed)
    buffers = SteeringBuffers(
        [SITE],
        hidden_size=width,
        max_rows=rows,
        max_tokens=tokens + 3,
        dtype=dtype,
        device=device,
        gates=gates,
        slots=SlotForm(slots, (*responses, *(BACK if looks_back else ())), writes),
    )
    buffers.any_active.fill_(True)
    buffers.table[0, 1:] = torch.from_numpy(rng.standard_normal((rows - 1, width)) / width**0.5).to(dtype)
    shape = (rows, slots)
    on = rng.random(shape) > 1 / 3
    on[0] = False
    read = np.where(on, rng.integers(1, rows, shape), 0)
    write = np.zeros_like(read)
    if writes:
        write = np.where(on & (rng.random(shape) < 1 / 2), rng.integers(1, rows, shape), 0)
        read = np.where((write > 0) & (rng.random(shape) < 1 / 3), 0, read)
    bounds = np.sort(rng.uniform(-2, 2, (*shape, 2)))
    bounds[..., 0][rng.random(shape) < 1 / 3] = -np.inf
    bounds[..., 1][rng.random(shape) < 1 / 3] = np.inf
    params = np.zeros((*shape, 10))
    params[..., 0] = 2.0 ** rng.integers(-3, 4, shape)
    params[..., 1] = rng.uniform(-1, 1, shape)
    params[..., 2] = rng.uniform(-2, 2, shape)
    params[..., 3:5] = bounds
    params[..., 5:] = rng.standard_normal((*shape, 5))  # numbers of other responses
    theirs = np.random.default_rng(seed)  # of features, so that those of others are what they are without
    others = [name for name in responses if name != FEATURE.name]
    codes = rng.choice([RESPONSES[name].code for name in others or responses], shape)
    if others != list(responses):
        codes = np.where(theirs.random(shape) < 1 / 3, FEATURE.code, codes)
    turns = codes == TURN.code
    params[turns, 2:5] = rng.uniform(-2, 2, (turns.sum(), 3))
    params[turns, 5] = rng.integers(0, 3, turns.sum())
    params[turns, -1] = rng.integers(0, slots, turns.sum())
    features = codes == FEATURE.code
    read = np.where(features, theirs.integers(1, rows, shape) * on, read)
    write = np.where(features, theirs.integers(1, rows, shape) * on, write)
    params[features, 2:5] = theirs.uniform(-2, 2, (features.sum(), 3))
    params[features, 5:7] = bounds[features]
    params[features, 7] = theirs.uniform(-2, 2, features.sum())
    params[~on] = codes[~on] = 0
    mix = np.eye(slots) + rng.uniform(-1, 1, (rows, slots, slots)) * (rng.random((rows, 1, 1)) < 1 / 2)
    mix *= on[:, None, :] & on[:, :, None]
    state = buffers.slots
    if looks_back:
        back = np.where(on & (rng.random(shape) < 1 / 2), rng.choice([RESPONSES[name].code for name in BACK], shape), 0)
        read = np.where(back > 0, 0, read)
        write = np.where(back == KEEP_NORM.code, 0, np.where(back > 0, rng.integers(1, rows, shape), write))
        params[..., 2] = np.where(back == REPLACE.code, rng.uniform(0, 1, shape) / slots, params[..., 2])
        params[..., 2] = np.where(back == KEEP_NORM.code, rng.integers(0, 2, shape), params[..., 2])
        apart = (back[:, :, None] == 0) & (back[:, None, :] == 0)
        mix = np.where(apart | np.eye(slots, dtype=bool), mix, 0.0)
        codes = np.where(back > 0, back, codes)
    named = [read, write]
    if buffers.slots.form.reads_float32:  # some digits are none
        drawn = [(theirs.random(shape) < 3 / 4) * theirs.integers(1, rows, shape) for _ in range(2)]
        named += [np.where(features & on, more, 0) for more in drawn]
    state.rows[0] = torch.from_numpy(np.stack(named, -1))
    state.codes[0, :, :, 0] = torch.from_numpy(codes)
    state.codes[0, :, :, 1] = torch.from_numpy(np.where(on, rng.integers(0, gates + 1, shape), 0))
    state.params[0] = torch.from_numpy(params)
    state.mix[0] = torch.from_numpy(mix)
    buffers.index[:tokens] = torch.from_numpy(rng.integers(0, rows, tokens))
    if gates:
        buffers.gates.values[:, :tokens] = torch.from_numpy(rng.random((gates, tokens)))
        buffers.gates.values[:, tokens:] = float("nan")
    module = nn.Module()
    buffers.attach(module, SITE)
    return Slotted(buffers, module, tokens)


def after(args: SlotOpArgs) -> Array:
    """What `steered` must become, unrounded."""
    return explained(args)[0]


def assert_noted(args: SlotOpArgs, due: Array, **tolerance: float) -> None:
    """`slot_corrections` hold what each slot that is there did, `due` [K, N]."""
    tokens = len(args.steered)
    there = (args.slot_rows != 0).any(-1)[args.steering_index[:tokens]].T.cpu().numpy()
    found = args.slot_corrections[:, :tokens].double().cpu().numpy()
    np.testing.assert_allclose(found[there], due[there], **tolerance)


def explained(args: SlotOpArgs) -> tuple[Array, Array]:
    """What `steered` must become, unrounded, and what each slot does of it [K, N]: the contract's formula, token by
    token and slot by slot."""
    table, steered = args.steering_table.double().cpu().numpy(), args.steered.double().cpu().numpy()
    rows, codes = args.slot_rows.cpu().numpy(), args.slot_codes.cpu().numpy()
    params, mix = args.slot_params.double().cpu().numpy(), args.slot_mix.double().cpu().numpy()
    gates = args.gate_values.double().cpu().numpy()
    rest = args.hidden_rest.double().cpu().numpy()
    hidden = args.hidden_states.double().cpu().numpy()
    out, told = steered.copy(), np.zeros((rows.shape[1], len(steered)))
    for token in range(len(steered)):
        row = int(args.steering_index[token])
        other = rest[token] if len(rest) else np.zeros_like(steered[token])
        opened = [gates[gate - 1, token] if gate else 1.0 for _, gate in codes[row]]
        for slot, (code, _) in enumerate(codes[row]):  # what looks back, and acts first
            x = hidden[token] + other if len(hidden) else None
            number = params[row, slot, 2] * opened[slot]
            if code in (REPLACE.code, NORM.code):
                told[slot, token] = number * (np.linalg.norm(x) if code == NORM.code else 1.0)
            if code == REPLACE.code:
                out[token] += mix[row, slot, slot] * number * table[rows[row, slot, 1]] - number * x
            if code == NORM.code:
                out[token] += mix[row, slot, slot] * number * np.linalg.norm(x) * table[rows[row, slot, 1]]
        stream = out[token] + other
        scores = [
            bias + (factor * (stream @ whole(table, read, more)) if read else 0.0)
            for (read, _, *more), (factor, bias, *_) in zip(rows[row], params[row], strict=True)
        ]
        numbers = [
            response(RESPONSE_OF[code], u, own, scores) * gate if RESPONSE_OF[code] in LOCAL else 0.0
            for u, (code, _), (_, _, *own), gate in zip(scores, codes[row], params[row], opened, strict=True)
        ]
        told[:, token] += numbers
        for slot, (read, write, *_) in enumerate(rows[row]):
            if read or write:
                out[token] += (mix[row, slot] @ numbers) * table[write or read]
        keeping = [params[row, slot, 2] for slot, (code, _) in enumerate(codes[row]) if code == KEEP_NORM.code]
        before, left = (np.linalg.norm(rows_of[token] + other) for rows_of in (hidden if keeping else out, out))
        if keeping and left and (left > before or not any(keeping)):
            out[token] = (out[token] + other) * before / left - other
    return out, told


def whole(table: Array, read: int, more: Sequence[int]) -> Array:
    """What is read: the rows of its digits, each in units 2^-8 times those of the one before."""
    return table[read] + sum(table[row] / 256.0**place for place, row in enumerate(more, start=1) if row)


def response(name: str, u: float, own: Sequence[float], scores: Sequence[float]) -> float:
    """What a slot makes of its score `u`; its `own` numbers end with the place of a second one among `scores`."""
    known = RESPONSES[name]
    seen = [u, scores[int(own[-1])]] if known.sees_two else [u]
    return FORMULAS[name](*seen, *own[: len(known.numbers)])
