"""The tensors of spans: for each request whose tokens' programs are decided on the device, what decides.

A request with spans (`trimtab.program.spans`) has a line here. Where it is in a step, the token records that the host
sends only name that line; `route` writes over them before the model runs. Where an engine serves no spans, none of this
exists.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from trimtab.ops.args import GATE_PARAMS
from trimtab.ops.gate_buffers import gate_record
from trimtab.ops.site_buffers import TOKEN_BYTES, aligned_record

RING = 64
"""Positions that a request's past is kept for: the id of each token, and what its atoms were behind it."""

RUNS, KINDS, PROGRAMS, ATOMS, NUMBERS = 4096, 32, 32, 4, 16  # of a request; numbers are what four atoms can make
ID_RANGES, SEQUENCES, LENGTH = 64, 8, 16  # of an atom; tokens of a sequence

MOST_DRAFTS = RING - LENGTH + 1
"""Tokens beyond its first that a step may compute in vain: what atoms look back to is then still there for the next."""

RUN_KIND = 32
"""A run is one number: where it begins times this, plus its kind."""

POSITIONS_BELOW = 2**26  # at which runs begin: what then fits int32

ID_SET, BETWEEN = 0, 1  # what an atom is
ATOM_HEAD = 16
"""Words of an atom before its body: what it is; of those between sequences whether it begins open, whether it looks
back into the prompt; how many ranges of ids or sequences it has, and how many of these, which come first, open; from
word 8 on the length of each sequence."""

ATOM_WORDS = ATOM_HEAD + max(2 * ID_RANGES, SEQUENCES * LENGTH)
"""The body of an atom are its ranges of ids, half-open, or its sequences, `LENGTH` words each, the last token first."""

HEAD = ("prompt", "runs", "atoms", "stride", "scheduled")
"""Prompt tokens; runs; atoms; the largest power of two below the number of runs, 0 for one run; whether any program has
a schedule."""

SCHEDULE = ("rate", "offset", "length", "is_there")
"""A factor by the place i of a token in the answer: 2^(rate * i) * clip((i + offset) / length, 0, 1)."""

ROW_GATE = 4  # where the factor of its row stands in a token's record, in words of 4 bytes
SHUT = 1.0e30  # a threshold at which a clock lets nothing through; less this, all


def gate_threshold(gates: int, gate: int) -> int:
    """Where the threshold of a gate stands in a token's record of so many gates, in words of 4 bytes."""
    fields = gate_record(gates).fields
    assert fields is not None
    return int(fields["params"][1]) // 4 + GATE_PARAMS * gate + 1


@cache
def span_record(gates: int) -> np.dtype[np.void]:
    """A request's line of `SpanBuffers.slab`: `HEAD`; for each kind of run and number of the atoms the program; for
    each program what its tokens' records are, their gate records of so many gates, and schedules: of the row, and of
    each gate; then atoms and runs."""
    gate_bytes = gate_record(gates).itemsize if gates else 0
    return aligned_record(
        {
            "head": (np.int32, (len(HEAD),)),
            "choices": (np.uint8, (KINDS, NUMBERS)),
            "tokens": (np.int64, (PROGRAMS, TOKEN_BYTES // 8)),
            "gates": (np.int64, (PROGRAMS, gate_bytes // 8)),
            "schedules": (np.float32, (PROGRAMS, 1 + gates, len(SCHEDULE))),
            "atoms": (np.int32, (ATOMS, ATOM_WORDS)),
            "runs": (np.int32, (RUNS,)),
        }
    )


class SpanBuffers:
    """Device state of the spans of R requests, numbered from 1, in passes of T tokens."""

    record: np.dtype[np.void]  # of a line
    slab: Tensor  # [1 + R, B] uint8, lines of `span_record`, contiguous
    head: Tensor  # [1 + R, 5] int32, a view of the slab like those below
    choices: Tensor  # [1 + R, KINDS, NUMBERS] uint8
    tokens: Tensor  # [1 + R, PROGRAMS, 8] int64: token records as words
    gates: Tensor  # [1 + R, PROGRAMS, W] int64: gate records as words; W is 0 where the engine has no gates
    schedules: Tensor  # [1 + R, PROGRAMS, 1 + G, 4] float32
    atoms: Tensor  # [1 + R, ATOMS, ATOM_WORDS] int32
    runs: Tensor  # [1 + R, RUNS] int32: ascending
    rings: Tensor  # [1 + R, 2, RING] int32: of position p at p % RING its id, and the bits of its atoms behind it
    decided: Tensor  # [T] int32: which program each token of a request with spans received in the last pass

    def __init__(
        self, requests: int, *, max_tokens: int, gates: int = 0, device: torch.device | str | None = None
    ) -> None:
        """`gates` that a token may have."""
        self.record = span_record(gates)
        self.slab = torch.zeros(1 + requests, self.record.itemsize, dtype=torch.uint8, device=device)
        self.head = self._part("head", torch.int32)
        self.choices = self._part("choices", torch.uint8)
        self.tokens = self._part("tokens", torch.int64)
        self.gates = self._part("gates", torch.int64)
        self.schedules = self._part("schedules", torch.float32)
        self.atoms = self._part("atoms", torch.int32)
        self.runs = self._part("runs", torch.int32)
        self.rings = torch.zeros(1 + requests, 2, RING, dtype=torch.int32, device=device)
        self.decided = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def _part(self, name: str, kind: torch.dtype) -> Tensor:
        """The view [1 + R, *shape] of one part of all lines."""
        assert self.record.fields is not None
        inner, start = self.record.fields[name][:2]
        first = start // kind.itemsize
        part = self.slab.view(kind)[:, first : first + inner.itemsize // kind.itemsize]
        return part.view(len(self.slab), *inner.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return self.slab.nbytes + self.rings.nbytes + self.decided.nbytes
