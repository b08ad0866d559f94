"""Triton kernel of `trimtab.ops.route`: all requests with spans of a pass in one launch.

There is a program for each token, and most have nothing to do. That of a request's first token takes all of its tokens
where atoms decide, a block at a time and in order, since what an atom has become is handed on; elsewhere that of the
first token of each block takes the request's tokens in it.
"""

import torch
import triton
import triton.language as tl

from trimtab.ops.args import GATE_PARAMS, RouteOpArgs
from trimtab.ops.kernels.launch import on_device
from trimtab.ops.span_buffers import (
    ATOM_HEAD,
    ATOM_WORDS,
    BETWEEN,
    KINDS,
    LENGTH,
    NUMBERS,
    PROGRAMS,
    RING,
    ROW_GATE,
    RUN_KIND,
    SEQUENCES,
    SHUT,
    gate_threshold,
)
from trimtab.ops.variants import note_launch

BLOCK = RING
"""Tokens that a program takes at once. No two of them have one entry of the ring."""


REGISTERS = 64
"""Of a thread. Left to itself the compiler takes 32, and spills."""


def launch_route(args: RouteOpArgs, count: int) -> None:
    """Decide about the first `count` tokens."""
    if count == 0:
        return
    gates = args.schedules.shape[2] - 1
    with on_device(args.token_words):
        route_kernel[(count,)](
            p_token_words=args.token_words,
            p_gate_words=args.gate_words,
            p_positions=args.positions,
            p_token_ids=args.token_ids,
            p_head=args.head,
            p_choices=args.choices,
            p_tokens=args.tokens,
            p_gates=args.gates,
            p_schedules=args.schedules,
            p_atoms=args.atoms,
            p_runs=args.runs,
            p_rings=args.rings,
            p_decided=args.decided,
            p_token_floats=args.token_words.view(torch.float32),
            p_gate_floats=args.gate_words.view(torch.float32),
            p_row_gates=args.tokens.view(torch.float32),
            count=count,
            bytes_of_line=args.choices.stride(0),
            GATE_WORDS=args.gate_words.shape[1],
            TOKEN_WORDS=args.token_words.shape[1],
            RUN_KIND=RUN_KIND,
            KINDS=KINDS,
            NUMBERS=NUMBERS,
            PROGRAMS=PROGRAMS,
            ATOM_WORDS=ATOM_WORDS,
            ATOM_HEAD=ATOM_HEAD,
            LENGTHS=ATOM_HEAD - SEQUENCES,
            LENGTH=LENGTH,
            BETWEEN=BETWEEN,
            GATES=gates,
            ROW_GATE=ROW_GATE,
            THRESHOLD=gate_threshold(gates, 0) if gates else 0,
            GATE_PARAMS=GATE_PARAMS,
            SHUT=SHUT,
            BLOCK=BLOCK,
            num_warps=BLOCK // 32,
            maxnreg=REGISTERS,
        )
    note_launch(route_kernel)


@triton.jit
def _later(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["count", "bytes_of_line"],
    do_not_specialize_on_alignment=["p_gate_words", "p_gate_floats", "p_positions", "p_token_ids", "p_gates"],
)
def route_kernel(  # type: ignore[no-untyped-def]
    p_token_words,
    p_gate_words,
    p_positions,
    p_token_ids,
    p_head,
    p_choices,
    p_tokens,
    p_gates,
    p_schedules,
    p_atoms,
    p_runs,
    p_rings,
    p_decided,
    p_token_floats,
    p_gate_floats,
    p_row_gates,
    count,
    bytes_of_line,
    GATE_WORDS: tl.constexpr,
    TOKEN_WORDS: tl.constexpr,
    RUN_KIND: tl.constexpr,
    KINDS: tl.constexpr,
    NUMBERS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ATOM_WORDS: tl.constexpr,
    ATOM_HEAD: tl.constexpr,
    LENGTHS: tl.constexpr,
    LENGTH: tl.constexpr,
    BETWEEN: tl.constexpr,
    GATES: tl.constexpr,
    ROW_GATE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    GATE_PARAMS: tl.constexpr,
    SHUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_first = tl.program_id(0)
    at_line = p_token_words + 1  # of a token's record: the line of its request's spans, 0 for none
    slot = tl.load(at_line + i_first.to(tl.int64) * TOKEN_WORDS)
    if slot > 0:
        before = tl.load(at_line + (i_first - 1).to(tl.int64) * TOKEN_WORDS, mask=i_first > 0, other=0)
        o_line = slot * bytes_of_line
        prompt = tl.load(p_head + o_line // 4)
        runs = tl.load(p_head + o_line // 4 + 1)
        atoms = tl.load(p_head + o_line // 4 + 2)
        widest = tl.load(p_head + o_line // 4 + 3)
        scheduled = tl.load(p_head + o_line // 4 + 4)
        if (slot != before) | ((atoms == 0) & (i_first % BLOCK == 0)):
            i_lane = tl.arange(0, BLOCK)
            at_ids = p_rings + slot * (2 * BLOCK)
            at_behind = at_ids + BLOCK
            end = count
            if atoms == 0:
                end = tl.minimum(count, (i_first // BLOCK + 1) * BLOCK)
            begun = tl.load(p_positions + i_first).to(tl.int32)
            state = tl.load(at_behind + (begun - 1 + BLOCK) % BLOCK)
            i_block = i_first
            more = True
            while more:
                i_token = i_block + i_lane
                o_token = i_token.to(tl.int64)
                mine = (i_token < end) & (tl.load(at_line + o_token * TOKEN_WORDS, mask=i_token < end, other=0) == slot)
                position = tl.load(p_positions + o_token, mask=mine, other=0).to(tl.int32)

                run = tl.zeros([BLOCK], tl.int32)
                stride = widest
                while stride > 0:
                    further = run + stride
                    inside = mine & (further < runs)
                    start = tl.load(p_runs + o_line // 4 + further, mask=inside, other=0)
                    run = tl.where(inside & (start <= position * RUN_KIND + (RUN_KIND - 1)), further, run)
                    stride = stride // 2
                kind = tl.load(p_runs + o_line // 4 + run, mask=mine, other=0) % RUN_KIND

                number = tl.zeros([BLOCK], tl.int32)
                if atoms > 0:
                    answer = mine & (position >= prompt)
                    token_id = tl.load(p_token_ids + o_token, mask=mine, other=-1).to(tl.int32)
                    behind = tl.zeros([BLOCK], tl.int32)
                    for atom in range(atoms):
                        at_atom = p_atoms + o_line // 4 + atom * ATOM_WORDS
                        what = tl.load(at_atom)
                        parts = tl.load(at_atom + 3)
                        if what == BETWEEN:
                            is_open = tl.load(at_atom + 1)
                            since = tl.where(tl.load(at_atom + 2) != 0, 0, prompt)
                            opens = tl.load(at_atom + 4)
                            opened = tl.zeros([BLOCK], tl.int32)
                            closed = tl.zeros([BLOCK], tl.int32)
                            for part in range(parts):
                                length = tl.load(at_atom + LENGTHS + part)
                                whole = answer & (position - length + 1 >= since)
                                for back in range(length):
                                    wanted = tl.load(at_atom + ATOM_HEAD + part * LENGTH + back)
                                    in_step = i_token - back >= i_first
                                    found = tl.load(p_token_ids + o_token - back, mask=whole & in_step, other=-1)
                                    at_entry = at_ids + (position - back + BLOCK) % BLOCK
                                    earlier = tl.load(at_entry, mask=whole & (in_step == 0), other=-1)
                                    whole = whole & (tl.where(in_step, found.to(tl.int32), earlier) == wanted)
                                opened = tl.where(whole & (part < opens), 1, opened)
                                closed = tl.where(whole & (part >= opens), 1, closed)
                            # Behind a token: what the last sequence that was complete by then has made of it.
                            complete = (opened | closed) != 0
                            made = tl.where(complete, 2 * i_lane + (opened & (1 - closed)), -1)
                            last = tl.associative_scan(made, 0, _later)
                            carried = tl.where(begun > prompt, (state >> atom) & 1, is_open)
                            now = tl.where(last >= 0, last & 1, carried)
                            behind |= now << atom
                            number |= tl.where(complete, 0, now) << atom
                        else:
                            listed = tl.zeros([BLOCK], tl.int32)
                            for part in range(parts):
                                low = tl.load(at_atom + ATOM_HEAD + 2 * part)
                                high = tl.load(at_atom + ATOM_HEAD + 2 * part + 1)
                                listed = tl.where((low <= token_id) & (token_id < high), 1, listed)
                            number |= listed << atom
                    number = tl.where(answer, number, 0)
                    tl.debug_barrier()  # all have read what the ring held before
                    tl.store(at_ids + position % BLOCK, token_id, mask=mine)
                    tl.store(at_behind + position % BLOCK, behind, mask=mine)
                    state = tl.sum(tl.where(i_lane == BLOCK - 1, behind, 0), 0)
                    begun = tl.maximum(begun, prompt + 1)  # from the second block on, it is handed on

                program = tl.load(p_choices + o_line + kind * NUMBERS + number, mask=mine, other=0).to(tl.int32)
                tl.store(p_decided + o_token, program, mask=mine)
                at_record = p_tokens + o_line // 8 + program * TOKEN_WORDS
                for word in tl.static_range(0, TOKEN_WORDS, 2):
                    value = tl.load(at_record + word, mask=mine, other=0)
                    tl.store(p_token_words + o_token * TOKEN_WORDS + word, value, mask=mine)
                for word in range(GATE_WORDS):
                    value = tl.load(p_gates + o_line // 8 + program * GATE_WORDS + word, mask=mine, other=0)
                    tl.store(p_gate_words + o_token * GATE_WORDS + word, value, mask=mine)
                if scheduled != 0:
                    place = (position - prompt).to(tl.float32)
                    for part in tl.static_range(1 + GATES):  # the row's, then those of gates
                        at_schedule = p_schedules + o_line // 4 + (program * (1 + GATES) + part) * 4
                        follows = mine & (tl.load(at_schedule + 3, mask=mine, other=0.0) != 0.0)
                        rate = tl.load(at_schedule, mask=follows, other=0.0)
                        offset = tl.load(at_schedule + 1, mask=follows, other=1.0)
                        length = tl.load(at_schedule + 2, mask=follows, other=1.0)
                        ramp = tl.minimum(tl.maximum((place + offset) / length, 0.0), 1.0)
                        factor = tl.exp2(rate * place) * ramp
                        if part == 0:
                            at_gate = p_row_gates + o_line // 4 + program * (2 * TOKEN_WORDS) + ROW_GATE
                            gate = tl.load(at_gate, mask=follows, other=0.0)
                            at_token = p_token_floats + o_token * (2 * TOKEN_WORDS) + ROW_GATE
                            tl.store(at_token, gate * factor, mask=follows)
                        else:
                            inner = tl.where((factor > 0.0) & (factor < 1.0), factor, 0.5)
                            threshold = tl.log((1.0 - inner) / inner)
                            threshold = tl.where(factor >= 1.0, -SHUT, tl.where(factor > 0.0, threshold, SHUT))
                            at_threshold = p_gate_floats + o_token * (2 * GATE_WORDS) + THRESHOLD
                            tl.store(at_threshold + (part - 1) * GATE_PARAMS, threshold, mask=follows)

                i_block += BLOCK
                more = (atoms > 0) & (tl.sum(mine.to(tl.int32), 0) == BLOCK)
