"""The runs of a request's positions, given what each intervention selects."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trimtab.errors import SteeringError
from trimtab.program.spans import MOST_ATOMS, MOST_KINDS, MOST_PROGRAMS, MOST_RUNS, Atom, Spans
from trimtab.sites import Phase
from trimtab.spec.intervals import OPEN, Intervals
from trimtab.spec.possible import possible_numbers
from trimtab.spec.selected import Part, Selected

Together = tuple[int, ...]
"""Interventions that act on one token, by their indices, ascending."""


class Layout(NamedTuple):
    """Spans, the interventions of each of their programs, and those that no token of an answer could make act."""

    spans: Spans
    programs: tuple[Together, ...]
    idle: Together


def laid_out(selections: Sequence[Selected], prompt_length: int) -> Layout:
    """The runs of a request with these interventions. Raises `SteeringError` for more than engines hold."""
    atoms = tuple(dict.fromkeys(atom for one in selections for atom in one.atoms))
    _check("conditions on the answer's tokens (`section`, `after`, `until`, `tokens`, ...)", len(atoms), MOST_ATOMS)
    deciders = [(_decider(one.kept, atoms), _decider(one.excluded, atoms)) for one in selections]
    numbers = possible_numbers(atoms)
    programs: dict[tuple[Phase, Together], int] = {}
    kinds: dict[tuple[int, ...], int] = {}
    starts: list[int] = []
    of_runs: list[int] = []
    acting: set[int] = set()

    def place(phase: Phase, together: Together) -> int:
        acting.update(together)
        return programs.setdefault((phase, together), len(programs))

    def add(start: int, choice: tuple[int, ...]) -> None:
        kind = kinds.setdefault(choice, len(kinds))
        if not of_runs or of_runs[-1] != kind:
            starts.append(start)
            of_runs.append(kind)

    choices: dict[int, tuple[int, ...]] = {}
    for start, mask in _runs([one.prompt for one in selections], prompt_length):
        if mask not in choices:
            choices[mask] = (place(Phase.PREFILL, _members(mask, len(selections))),)
        add(start, choices[mask])
    choices = {}
    parts = [one.kept.answer for one in selections] + [one.excluded.answer for one in selections]
    for start, mask in _runs(parts, OPEN):
        if mask not in choices:
            by_number = {number: _together(mask, number, deciders) for number in numbers}
            found = {number: place(Phase.DECODE, together) for number, together in by_number.items()}
            some = next(iter(found.values()))
            every = tuple(found.get(number, some) for number in range(1 << len(atoms)))
            choices[mask] = (some,) if len(set(every)) == 1 else every
        add(prompt_length + start, choices[mask])
    _check("runs of positions", len(starts), MOST_RUNS)
    _check("programs (sets of interventions that act together, in prompt and answer)", len(programs), MOST_PROGRAMS)
    _check("kinds of runs", len(kinds), MOST_KINDS)
    phases = tuple(phase for phase, _ in programs)
    asked = atoms if any(len(choice) > 1 for choice in kinds) else ()
    spans = Spans(prompt_length, tuple(starts), tuple(of_runs), tuple(kinds), phases, asked)
    idle = tuple(index for index in range(len(selections)) if index not in acting)
    return Layout(spans, tuple(together for _, together in programs), idle)


Decider = tuple[int, int]
"""Which bits of a number are looked at, and what they must be."""


def _decider(part: Part, atoms: Sequence[Atom]) -> Decider | None:
    """None where no number will do: the part asks for what is and is not."""
    care = want = 0
    for atom, yes in part.says:
        bit = 1 << atoms.index(atom)
        if care & bit and bool(want & bit) != yes:
            return None
        care, want = care | bit, want | bit * yes
    return care, want


def _holds(decider: Decider | None, number: int) -> bool:
    return decider is not None and number & decider[0] == decider[1]


def _together(mask: int, number: int, deciders: Sequence[tuple[Decider | None, Decider | None]]) -> Together:
    """The interventions that act where `mask` says whose parts a position is in, on a token of `number`."""
    count = len(deciders)
    return tuple(
        index
        for index, (kept, excluded) in enumerate(deciders)
        if mask >> index & 1 and _holds(kept, number) and not (mask >> (count + index) & 1 and _holds(excluded, number))
    )


def _members(mask: int, count: int) -> Together:
    return tuple(index for index in range(count) if mask >> index & 1)


def _runs(sets: Sequence[Intervals], end: int) -> Iterable[tuple[int, int]]:
    """Where the positions from 0 to before `end` change the sets that they are in, and those: bit s is set s."""
    changes: dict[int, int] = {0: 0}
    for place, some in enumerate(sets):
        for edges in some:
            for edge in edges:
                changes[edge] = changes.get(edge, 0) ^ 1 << place
    mask = 0
    for start in sorted(changes):
        if start < end:
            yield start, (mask := mask ^ changes[start])


def _check(what: str, found: int, most: int) -> None:
    if found > most:
        said = f"come to {found} {what} in this request, at most {most} are served: give fewer interventions or ranges"
        raise SteeringError("interventions", said)
