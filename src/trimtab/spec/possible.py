"""Which numbers the atoms of an answer can make of one token.

Not all can be: no token lies in the model's thinking and in its response. A program of interventions that never meet
is never run, so it need not be made, nor be one that an engine could serve.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

from trimtab.program.spans import Atom, Between, IdSet

TokenSequence = tuple[int, ...]


@lru_cache(maxsize=256)
def possible_numbers(atoms: tuple[Atom, ...]) -> tuple[int, ...]:
    """The numbers that some token of some answer can have, ascending; bit a is what atom a says.

    Each step of an answer completes some of the atoms' sequences or none. All states that can be reached so are walked
    through, and in each the tokens that tell the sets of ids apart.
    """
    completing = _completing(atoms)
    plain = _plain_patterns(atoms)
    first = tuple(isinstance(atom, Between) and atom.is_open for atom in atoms)
    reached, to_do, numbers = {first}, [first], set[int]()
    while to_do:
        states = to_do.pop()
        numbers |= {_number(states) | pattern for pattern in plain}
        for token, hits in completing:
            said = [state and not any(hit) for state, hit in zip(states, hits, strict=True)]
            numbers.add(_number(said) | _pattern(atoms, token))
            after = tuple((state or opens) and not closes for state, (opens, closes) in zip(states, hits, strict=True))
            if after not in reached:
                reached.add(after)
                to_do.append(after)
    return tuple(sorted(numbers))


def _number(said: Sequence[bool]) -> int:
    return sum(yes << place for place, yes in enumerate(said))


def _pattern(atoms: Sequence[Atom], token: int) -> int:
    """What the sets of ids say of a token."""
    return _number([isinstance(atom, IdSet) and token in atom for atom in atoms])


Hits = tuple[tuple[bool, bool], ...]
"""Of each atom, whether it is opened and whether it is closed."""


def _completing(atoms: Sequence[Atom]) -> set[tuple[int, Hits]]:
    """The ways in which a token can complete sequences, with its id.

    Where it completes one, it completes those that the one ends with. Of a sequence that begins in the prompt, an atom
    that does not look back there sees only what is short enough.
    """
    found: set[tuple[int, Hits]] = set()
    for whole in _sequences(atoms):
        ends = {whole[-count:] for count in range(1, len(whole) + 1)}
        for most in range(1, len(whole) + 1):  # tokens of it that lie in the answer
            short = {end for end in ends if len(end) <= most}
            found.add((whole[-1], tuple(_hits(atom, ends, short) for atom in atoms)))
    return found


def _hits(atom: Atom, ends: set[TokenSequence], short: set[TokenSequence]) -> tuple[bool, bool]:
    if isinstance(atom, IdSet):
        return False, False
    seen = ends if atom.looks_back else short
    return not seen.isdisjoint(atom.opens), not seen.isdisjoint(atom.closes)


def _sequences(atoms: Sequence[Atom]) -> Iterator[TokenSequence]:
    for atom in atoms:
        if isinstance(atom, Between):
            yield from (*atom.opens, *atom.closes)


def _plain_patterns(atoms: Sequence[Atom]) -> set[int]:
    """What the sets of ids can say of a token that completes no sequence."""
    alone = {one[0] for one in _sequences(atoms) if len(one) == 1}
    edges = {edge for atom in atoms if isinstance(atom, IdSet) for both in atom.ranges for edge in both}
    edges |= {edge for token in alone for edge in (token, token + 1)} | {0}
    return {_pattern(atoms, token) for token in edges if token not in alone}
