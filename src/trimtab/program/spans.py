"""Which positions of a request receive which of its programs.

A request's positions are cut into runs. In a run one program is received by every token, or, where the answer's own
tokens decide, one of several: an `Atom` is a yes or no about a token that follows from its id and those before it, and
the atoms of a token, read as a number, choose its program. Runs cover every position; the last has no end.

Only the answer has atoms: what the prompt's tokens say is known when it is, and is written as runs.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trimtab.sites import Phase
from trimtab.wording import summary

MOST_RUNS = 4096  # of a request
MOST_PROGRAMS = 32  # different ones of a request
MOST_ATOMS = 4  # different ones of a request
MOST_KINDS = 32  # of runs of a request
MOST_ID_RANGES = 64  # of a set of ids
MOST_SEQUENCES = 4  # that open, or close
LONGEST_SEQUENCE = 16  # tokens
POSITIONS_BELOW = 1 << 26  # at which runs begin: engines hold a position and a kind in one int32
IDS_BELOW = 1 << 31

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class IdSet:
    """Yes for a token whose id lies in one of some half-open ranges, which are sorted and do not touch."""

    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, token: int) -> bool:
        place = bisect_right(self.ranges, token, key=lambda one: one[0]) - 1
        return place >= 0 and token < self.ranges[place][1]

    def says(self, ids: IntArray) -> npt.NDArray[np.bool_]:
        """[N]: the same of `ids` [N] at once."""
        edges = np.array([edge for both in self.ranges for edge in both], np.int64)
        within: npt.NDArray[np.bool_] = np.searchsorted(edges, ids, side="right") % 2 == 1
        return within


@dataclass(frozen=True)
class Between:
    """Yes for tokens behind one of `opens`, sequences of ids, and before one of `closes`.

    Each time that a sequence is complete, with its last token, it opens or closes; where both are, it closes. That
    token itself is a no. `is_open` says how the answer begins. A sequence lies in the answer as a whole unless it
    `looks_back`: then it may begin in the prompt.
    """

    opens: tuple[tuple[int, ...], ...] = ()
    closes: tuple[tuple[int, ...], ...] = ()
    is_open: bool = False
    looks_back: bool = False


Atom = IdSet | Between


@dataclass(frozen=True)
class Spans:
    """The runs of one request.

    Run r begins at position `starts[r]`, the first at 0, and is of kind `kinds[r]`. `choices[kind]` are places in the
    request's programs: one, or one for each number that `atoms` can make (bit a says what atom a says). A run begins
    where the prompt ends; runs before it are decided by no atom. `phases` says of each program whether it is one of
    prompt tokens or of others: none is both.
    """

    prompt_length: int
    starts: tuple[int, ...]
    kinds: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    phases: tuple[Phase, ...]
    atoms: tuple[Atom, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for what is no cover of positions, or more than engines hold."""
        if fault := self._fault():
            raise ValueError(fault)

    @property
    def decided_by_tokens(self) -> bool:
        """Whether any run is."""
        return bool(self.atoms)

    def run_at(self, position: int) -> int:
        """The run that holds `position`."""
        return bisect_right(self.starts, position) - 1

    def programs_at(self, position: int) -> tuple[int, ...]:
        """The programs that a token at `position` may receive."""
        return self.choices[self.kinds[self.run_at(position)]]

    def runs(self, end: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """The runs of the positions before `end`: where each begins and stops, and what its tokens may receive."""
        stops = [*self.starts[1:], end]
        for start, stop, kind in zip(self.starts, stops, self.kinds, strict=True):
            if start < end:
                yield start, min(stop, end), self.choices[kind]

    def decided(self, tokens: Sequence[int], first: int = 0) -> IntArray:
        """The program of each of `tokens` but those before `first`, which is at most the length of the prompt.

        They are a whole prompt and what was answered so far. Computed for all at once: servers count long answers so.
        """
        ids = np.asarray(tokens, np.int64)
        numbers = np.zeros(len(ids), np.int64)
        for place, atom in enumerate(self.atoms):
            said = atom.says(ids) if isinstance(atom, IdSet) else _open_at(ids, atom, self.prompt_length)
            numbers[self.prompt_length :] |= said[self.prompt_length :].astype(np.int64) << place
        decided = np.empty(len(ids), np.int64)
        for start, stop, choice in self.runs(len(ids)):
            decided[start:stop] = np.asarray(choice)[numbers[start:stop]] if len(choice) > 1 else choice[0]
        return decided[first:]

    @cached_property
    def used(self) -> frozenset[int]:
        """The programs that any token may receive."""
        return frozenset(place for kind in self.kinds for place in self.choices[kind])

    def _fault(self) -> str:
        limits = {
            "runs": (len(self.starts), MOST_RUNS),
            "programs": (len(self.phases), MOST_PROGRAMS),
            "atoms": (len(self.atoms), MOST_ATOMS),
            "kinds of runs": (len(self.choices), MOST_KINDS),
        }
        for name, (found, most) in limits.items():
            if found > most:
                return f"{found} {name}; at most {most} are served"
        return (
            self._fault_of_starts() or self._fault_of_choices() or next(filter(None, map(_atom_fault, self.atoms)), "")
        )

    def _fault_of_starts(self) -> str:
        starts, prompt = self.starts, self.prompt_length
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            return f"runs begin at {summary(starts)}; want ascending positions from 0"
        if starts[-1] >= POSITIONS_BELOW:
            return f"a run begins at {starts[-1]}; want a position below {POSITIONS_BELOW}"
        if len(starts) != len(self.kinds):
            return f"{len(starts)} runs begin and {len(self.kinds)} have a kind"
        if prompt < 1 or prompt not in starts:
            return f"no run begins at {prompt}, where the prompt ends"
        return ""

    def _fault_of_choices(self) -> str:
        numbers = 1 << len(self.atoms)
        for choice in self.choices:
            if len(choice) not in (1, numbers):
                return f"a choice of {len(choice)} programs; want 1, or {numbers} for {len(self.atoms)} atoms"
        for start, kind in zip(self.starts, self.kinds, strict=True):
            if not 0 <= kind < len(self.choices):
                return f"the run at {start} is of kind {kind}; there are {len(self.choices)}"
            phase = Phase.PREFILL if start < self.prompt_length else Phase.DECODE
            if phase is Phase.PREFILL and len(self.choices[kind]) != 1:
                return f"the run at {start} of the prompt is decided by tokens of the answer"
            for place in self.choices[kind]:
                if not 0 <= place < len(self.phases) or self.phases[place] is not phase:
                    return f"the run at {start} has program {place}, which is none of {phase}"
        return ""


def _atom_fault(atom: Atom) -> str:
    if isinstance(atom, IdSet):
        edges = [edge for one in atom.ranges for edge in one]
        if len(atom.ranges) > MOST_ID_RANGES:
            return f"{len(atom.ranges)} ranges of ids; at most {MOST_ID_RANGES} are served"
        if not edges or edges[0] < 0 or edges[-1] > IDS_BELOW or any(a >= b for a, b in pairwise(edges)):
            return f"ids in {summary(atom.ranges)}; want ascending half-open ranges that do not touch"
        return ""
    if not (atom.opens or atom.closes):
        return "an atom that nothing opens or closes"
    for some in (atom.opens, atom.closes):
        if len(some) > MOST_SEQUENCES or not all(0 < len(one) <= LONGEST_SEQUENCE for one in some):
            return f"{len(some)} sequences; want at most {MOST_SEQUENCES} of 1 to {LONGEST_SEQUENCE} ids"
        if not all(0 <= token < IDS_BELOW for one in some for token in one):
            return "a sequence has what is no id of a token"
    return ""


def _open_at(ids: IntArray, atom: Between, prompt_length: int) -> npt.NDArray[np.bool_]:
    """[N]: for each token of an answer whether it is open there and the token itself neither opens nor closes."""
    first = 0 if atom.looks_back else prompt_length
    closes = ends_of(ids, atom.closes, first)
    opens = ends_of(ids, atom.opens, first) & ~closes
    said = opens | closes
    said[:prompt_length] = False  # how the answer begins, `is_open` says
    last = np.maximum.accumulate(np.where(said, np.arange(len(ids)), -1))  # the token that decided it
    return np.where(last < 0, atom.is_open, opens[last]) & ~said


def ends_of(ids: IntArray, sequences: Sequence[Sequence[int]], first: int = 0) -> npt.NDArray[np.bool_]:
    """[N]: at which places one of `sequences` ends that begins at `first` or later."""
    found = np.zeros(len(ids), np.bool_)
    for sequence in sequences:
        starts = len(ids) - len(sequence) + 1 - first
        if starts > 0:
            matches = np.ones(starts, np.bool_)
            for offset, token in enumerate(sequence, first):
                matches &= ids[offset : offset + starts] == token
            found[first + len(sequence) - 1 :] |= matches
    return found
