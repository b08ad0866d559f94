"""A request's spans as the device reads them, and what its atoms have come to behind tokens that it will not read."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimtab.ops.span_buffers import ATOM_HEAD, BETWEEN, ID_SET, LENGTH, RING, RUN_KIND, SEQUENCES
from trimtab.program.joint_gate import lanes
from trimtab.program.lowering import Placed
from trimtab.program.schedules import Schedule
from trimtab.program.spans import Between, IdSet, Spans

Ids = npt.NDArray[np.int64]


Schedules = Sequence[Sequence[Schedule | None]]
"""Of each program the schedule of its row, then those of its gates' lanes."""


def schedules_of(programs: Sequence[Placed]) -> Schedules:
    """Those that the sums of `programs` follow."""
    return [
        [program.schedule, *(gate.schedule for item in program.gated for gate, _ in lanes(item.gate))]
        for program in programs
    ]


def span_line(
    record: np.dtype[np.void], spans: Spans, tokens: npt.NDArray[np.int64], schedules: Schedules = ()
) -> npt.NDArray[np.void]:
    """The line [1] of `spans`; `tokens` [P, 8] are the token records of its programs. Gate records are left 0."""
    line = np.zeros(1, record)
    runs = [start * RUN_KIND + kind for start, kind in zip(spans.starts, spans.kinds, strict=True)]
    stride = 1 << (len(runs) - 1).bit_length() - 1 if len(runs) > 1 else 0
    for own, followed in zip(line["schedules"][0], schedules, strict=False):
        for numbers, schedule in zip(own, followed, strict=False):
            numbers[:] = (0.0, 0.0, 0.0, 0.0) if schedule is None else (*schedule, 1.0)
    line["head"] = spans.prompt_length, len(runs), len(spans.atoms), stride, line["schedules"].any()
    for kind, choice in enumerate(spans.choices):
        line["choices"][0, kind, : len(choice)] = choice
        if len(choice) == 1:
            line["choices"][0, kind] = choice[0]
    line["tokens"][0, : len(tokens)] = tokens
    for words, atom in zip(line["atoms"][0], spans.atoms, strict=False):
        _write_atom(words, atom)
    line["runs"][0, : len(runs)] = runs
    return line


def _write_atom(words: npt.NDArray[np.int32], atom: IdSet | Between) -> None:
    body = words[ATOM_HEAD:]
    if isinstance(atom, IdSet):
        words[:5] = ID_SET, 0, 0, len(atom.ranges), 0
        body[: 2 * len(atom.ranges)] = np.clip(np.array(atom.ranges).reshape(-1), 0, 2**31 - 1)
        return
    sequences = (*atom.opens, *atom.closes)
    words[:5] = BETWEEN, atom.is_open, atom.looks_back, len(sequences), len(atom.opens)
    words[ATOM_HEAD - SEQUENCES : ATOM_HEAD][: len(sequences)] = [*map(len, sequences)]
    for line, sequence in zip(body.reshape(-1, LENGTH), sequences, strict=False):
        line[: len(sequence)] = sequence[::-1]


def ring_after(spans: Spans, tokens: Sequence[int], upto: int) -> npt.NDArray[np.int32]:
    """What a request's ring holds once the first `upto` of `tokens`, its prompt and what was answered so far, have been
    computed: [2, RING], ids and bits of atoms. Entries of positions that it does not have are 0."""
    ring = np.zeros((2, RING), np.int32)
    kept = np.arange(max(0, upto - RING), upto)
    if not len(kept):
        return ring
    ids: Ids = np.asarray(tokens[:upto], np.int64)
    ring[0, kept % RING] = ids[kept]
    for place, atom in enumerate(spans.atoms):
        if isinstance(atom, Between):
            ring[1, kept % RING] |= _open_behind(atom, ids, spans.prompt_length)[kept].astype(np.int32) << place
    return ring


def _open_behind(atom: Between, ids: Ids, prompt: int) -> npt.NDArray[np.bool_]:
    """Whether `atom` is open behind each token."""
    first = 0 if atom.looks_back else prompt
    opens, closes = _completed(ids, atom.opens, first, prompt), _completed(ids, atom.closes, first, prompt)
    places = np.arange(len(ids))
    last = np.maximum.accumulate(np.where(opens | closes, places, -1))
    return np.asarray(np.where(last >= 0, (opens & ~closes)[last], atom.is_open))


def _completed(ids: Ids, sequences: Sequence[Sequence[int]], first: int, answer: int) -> npt.NDArray[np.bool_]:
    """Whether one of `sequences` that begins at `first` or later is complete with each token from `answer` on."""
    found = np.zeros(len(ids), np.bool_)
    for sequence in sequences:
        starts = max(len(ids) - len(sequence) + 1, 0)
        whole = np.ones(starts, np.bool_)
        for place, wanted in enumerate(sequence):
            whole &= ids[place : place + starts] == wanted
        whole[:first] = False
        found[len(sequence) - 1 :] |= whole
    found[:answer] = False
    return found
