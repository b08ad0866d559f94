"""Which program each token receives whose request has spans: decided on the device, before the model runs.

    run      the last that begins at or before the token's position
    number   bit a is what atom a says of the token; 0 in a prompt
    program  choices[kind of the run, number]

The token's record and its gates' become those of that program. `trimtab.program.spans` says what runs and atoms are.

A program may have schedules: of its row, whose factor is multiplied by that of the token's place in the answer, and of
a gate. Such a gate is a clock: it reads nothing, its score is 0, and the threshold that is written for it makes it open
as far as the schedule says.

An atom between sequences is open behind a token or it is not. What it was behind the tokens of earlier steps is found
in a ring by position, so a step may begin anywhere in what was computed before: drafts that were rejected, and tokens
that are computed again, need nothing.

This is the reference, and the way to the kernel (`kernels.route`), which does the same in one launch.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from trimtab.ops import variants
from trimtab.ops.args import RouteOpArgs
from trimtab.ops.library import has_triton
from trimtab.ops.span_buffers import (
    ATOM_HEAD,
    BETWEEN,
    ID_RANGES,
    LENGTH,
    RING,
    ROW_GATE,
    RUN_KIND,
    SEQUENCES,
    SHUT,
    SpanBuffers,
    gate_threshold,
)

SLOT_WORD = 1  # of a token's record: the line of its request's spans, 0 for none
STEERED_WORDS = (0, 2, 4, 6)  # row, its gate, token scale, decode mask


def route_args(
    buffers: SpanBuffers, token_words: Tensor, gate_words: Tensor, positions: Tensor, token_ids: Tensor | None
) -> RouteOpArgs:
    """The arguments of `route` for a pass over tokens with these positions and ids."""
    ids = positions[:0] if token_ids is None else token_ids
    parts = {name: getattr(buffers, name) for name in RouteOpArgs._fields[4:]}
    return RouteOpArgs(token_words, gate_words, positions, ids, **parts)


def route(args: RouteOpArgs, count: int) -> None:
    """Decide about the first `count` tokens. Raises ValueError where positions or ids are fewer."""
    ids = len(args.token_ids)
    if not count <= len(args.positions) or (ids and not count <= ids):
        raise ValueError(f"{count} tokens, but {len(args.positions)} positions and {ids} ids")
    if _launches_kernel(args):
        from trimtab.ops.kernels.route import launch_route

        launch_route(args, count)
    else:
        route_reference(args, count)


def _launches_kernel(args: RouteOpArgs) -> bool:
    return args.positions.is_cuda and has_triton()


def warmup_route_kernel(launches: Iterable[RouteOpArgs]) -> int:
    """Launch the kernel with each of these arguments, for one token, which must be nobody's. How many variants that
    compiled; any that appears later is counted by `late_variants`. Without kernels it does nothing."""
    served = [args for args in launches if _launches_kernel(args)]
    if not served:
        return 0
    from trimtab.ops.kernels.route import route_kernel

    before = variants.compiled_variants(route_kernel)
    variants.pause(route_kernel)
    for args in served:
        route(args, 1)
    variants.watch(route_kernel)
    return variants.compiled_variants(route_kernel) - before


def route_reference(args: RouteOpArgs, count: int) -> None:
    """The same in plain torch."""
    slots, positions = args.token_words[:count, SLOT_WORD], args.positions[:count].long()
    mine = slots > 0
    kinds = _kinds(args, slots, positions)
    numbers = torch.zeros_like(slots)
    thinking = (args.head[slots, 2] > 0).nonzero()[:, 0]  # tokens whose requests have atoms
    if len(thinking):
        numbers[thinking] = _numbers(args, thinking, slots, positions)
    programs = args.choices[slots, kinds, numbers].long()
    args.decided[:count] = torch.where(mine, programs.int(), args.decided[:count])
    words = args.token_words[:count]
    routed = torch.where(mine[:, None], args.tokens[slots, programs], words)
    for word in STEERED_WORDS:
        words[:, word] = routed[:, word]
    gates = args.gate_words[:count]
    gates.copy_(torch.where(mine[:, None], args.gates[slots, programs], gates))
    scheduled = (mine & (args.head[slots, 4] > 0)).nonzero()[:, 0]
    if len(scheduled):
        places = positions - args.head[slots, 0]
        _follow(args, scheduled, places[scheduled], args.schedules[slots[scheduled], programs[scheduled]])


def _follow(args: RouteOpArgs, tokens: Tensor, places: Tensor, schedules: Tensor) -> None:
    """Let the records of `tokens` [M] follow `schedules` [M, 1 + G, 4], at these places in their answers."""
    rate, offset, length, is_there = schedules.unbind(-1)
    place = places.float()[:, None]
    ramp = ((place + offset) / torch.where(is_there != 0, length, 1.0)).clamp(0.0, 1.0)
    factors = torch.where(is_there != 0, torch.exp2(rate * place) * ramp, 1.0)
    args.token_words.view(torch.float32)[tokens, ROW_GATE] *= factors[:, 0]
    thresholds = ((1.0 - factors) / factors).log().clamp(-SHUT, SHUT)
    gates = args.gate_words.view(torch.float32)
    for gate in range(schedules.shape[1] - 1):
        at = gate_threshold(schedules.shape[1] - 1, gate)
        gates[tokens, at] = torch.where(is_there[:, 1 + gate] != 0, thresholds[:, 1 + gate], gates[tokens, at])


def _kinds(args: RouteOpArgs, slots: Tensor, positions: Tensor) -> Tensor:
    """The kind of the run that each token lies in."""
    count, last = args.head[slots, 1], positions * RUN_KIND + RUN_KIND - 1
    run = torch.zeros_like(slots)
    stride = args.runs.shape[1] // 2
    while stride:
        further = run + stride
        found = args.runs[slots, further.clamp(max=args.runs.shape[1] - 1)]
        run = torch.where((further < count) & (found <= last), further, run)
        stride //= 2
    return args.runs[slots, run].long() % RUN_KIND


def _numbers(args: RouteOpArgs, tokens: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """What the atoms of `tokens` [M], by place, say. Notes in the rings what they are behind them."""
    first = _first(slots)[tokens]
    slots, positions, ids = slots[tokens], positions[tokens], args.token_ids[tokens].long()
    atoms, places = args.atoms[slots].long(), torch.arange(args.atoms.shape[1], device=tokens.device)
    prompts = args.head[slots, 0].long()
    answer = positions >= prompts
    opened, closed = _completed(args, tokens, first, slots, positions, prompts, atoms)
    opened, closed = opened & answer[:, None], closed & answer[:, None]

    # Behind a token an atom is what the last sequence that was complete by then has made of it.
    last = torch.where(opened | closed, 2 * tokens[:, None] + (opened & ~closed), -1).cummax(0).values
    begun = positions - (tokens - first)
    before = args.rings[slots, 1, (begun - 1) % RING].long()[:, None] >> places & 1
    before = torch.where((begun > prompts)[:, None], before, atoms[:, :, 1])
    behind = torch.where(last >= 2 * first[:, None], last % 2, before)

    ranges = atoms[:, :, ATOM_HEAD : ATOM_HEAD + 2 * ID_RANGES].reshape(*atoms.shape[:2], ID_RANGES, 2)
    listed = ((ranges[..., 0] <= ids[:, None, None]) & (ids[:, None, None] < ranges[..., 1])).any(2)
    said = torch.where(atoms[:, :, 0] == BETWEEN, (behind > 0) & ~(opened | closed), listed)

    lengths = torch.bincount(first)[first]
    kept = tokens + RING >= first + lengths
    rings = torch.stack([ids, (behind << places).sum(1)], 1).int()
    args.rings[slots[kept], :, positions[kept] % RING] = rings[kept]
    return torch.where(answer, ((said & answer[:, None]).long() << places).sum(1), 0)


def _first(slots: Tensor) -> Tensor:
    """The place of the first token of each token's request."""
    begins = torch.ones_like(slots, dtype=torch.bool)
    begins[1:] = slots[1:] != slots[:-1]
    return torch.where(begins, torch.arange(len(slots), device=slots.device), 0).cummax(0).values


def _completed(
    args: RouteOpArgs, tokens: Tensor, first: Tensor, slots: Tensor, positions: Tensor, prompts: Tensor, atoms: Tensor
) -> tuple[Tensor, Tensor]:
    """[M, ATOMS] each: whether a sequence that opens, or one that closes, is complete with each token."""
    back = torch.arange(LENGTH, device=tokens.device)
    at = tokens[:, None] - back
    in_step = args.token_ids[at.clamp(min=0)].long()
    earlier = args.rings[slots[:, None], 0, (positions[:, None] - back) % RING].long()
    past = torch.where(at >= first[:, None], in_step, earlier)  # [M, LENGTH] ids, the token's own first
    bodies = atoms[:, :, ATOM_HEAD : ATOM_HEAD + SEQUENCES * LENGTH].reshape(*atoms.shape[:2], SEQUENCES, LENGTH)
    lengths = atoms[:, :, ATOM_HEAD - SEQUENCES : ATOM_HEAD]
    equal = ((past[:, None, None] == bodies) | (back >= lengths[..., None])).all(3)
    since = torch.where(atoms[:, :, 2] > 0, 0, prompts[:, None])
    whole = positions[:, None, None] - lengths + 1 >= since[..., None]
    number = torch.arange(SEQUENCES, device=tokens.device)
    complete = equal & whole & (lengths > 0) & (atoms[:, :, :1] == BETWEEN)
    opens = number < atoms[:, :, 4:5]
    return (complete & opens).any(2), (complete & ~opens).any(2)
