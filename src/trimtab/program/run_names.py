"""What each position of a request receives, by name: equal names say that equal tokens there have equal KV.

A run of one program has that program's identity, or "-" where it does nothing. In a run that is decided by tokens, what
a token receives follows from the tokens before it, from where the answer begins and from how it is decided: its name is
a digest of its definition, "#", and how many tokens of the answer lie before it. So it is with a schedule, for which
the name is that of its program. Neighbours that receive the same are
one run, and those that tokens decide are so where their definitions are equal.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence

from trimtab.program.spans import Atom, IdSet, Spans
from trimtab.sites import Phase

NOTHING = "-"

NamedRuns = tuple[tuple[int, str], ...]  # the first position of each, and its name


def named_runs(spans: Spans, programs: Sequence[tuple[str, bool]], phase: Phase | None = None) -> NamedRuns:
    """The runs of `spans`, or those of one phase; a first one that receives nothing is left out. Of each program there
    is its identity, and whether it follows a schedule."""
    names = [_name(spans.atoms, [programs[place] for place in choice]) for choice in spans.choices]
    named: list[tuple[int, str]] = []
    last = (NOTHING, False)
    for start, kind in zip(spans.starts, spans.kinds, strict=True):
        if phase is not None and (start < spans.prompt_length) is (phase is Phase.DECODE):
            continue
        if names[kind] != last:
            last = name, decided = names[kind]
            named.append((start, f"{name}#{start - spans.prompt_length}" if decided else name))
    return tuple(named)


def plain_runs(prefill: str, decode: str, prompt_length: int) -> NamedRuns:
    """The same for a request that says no more than phases, from the identities of its two programs."""
    first, then = prefill or NOTHING, decode or NOTHING
    if first == then:
        return ((0, first),) if prefill else ()
    return ((0, first), (prompt_length, then)) if prefill else ((prompt_length, then),)


def identity_of(runs: NamedRuns, first: int = 0) -> str:
    """Hex digest of the runs of a phase that begins at `first`; "" where nothing is received."""
    if not runs:
        return ""
    start, name = runs[0]
    if len(runs) == 1 and start == first and "#" not in name:
        return name
    told = "".join(f"{start - first}={name}\0" for start, name in runs)
    return hashlib.sha256(b"trimtab spans 1\0" + told.encode()).hexdigest()


def _name(atoms: Sequence[Atom], programs: Sequence[tuple[str, bool]]) -> tuple[str, bool]:
    """The name of what tokens receive that get one of `programs`, and whether it matters where the answer begins."""
    name, decided = _definition(atoms, [identity or NOTHING for identity, _ in programs])
    return name, decided or programs[0][1]


def _definition(atoms: Sequence[Atom], names: Sequence[str]) -> tuple[str, bool]:
    """The name of what tokens receive that get one of `names`, and whether tokens decide which.

    Atoms that make no difference are no part of it, nor is the order in which a request has them.
    """
    if len(names) == 1:
        return names[0], False
    bits: dict[bytes, int] = {}  # of equal atoms together: they say the same
    for place, atom in enumerate(atoms):
        bits[_digest(atom)] = bits.get(_digest(atom), 0) | 1 << place
    deciding = sorted(bits)
    for digest, own in sorted(bits.items()):
        without = [one for one in deciding if one != digest]
        if all(names[number] == names[number | own] for number in _numbers(without, bits)):
            deciding = without
    if not deciding:
        return names[0], False
    told = [names[number] for number in _numbers(deciding, bits)]
    whole = b"trimtab decided 1\0" + b"".join(deciding) + "".join(f"\0{name}" for name in told).encode()
    return hashlib.sha256(whole).hexdigest(), True


def _numbers(atoms: Sequence[bytes], bits: Mapping[bytes, int]) -> list[int]:
    """All that these atoms can say, the others saying no: the first atom's answer changes fastest."""
    numbers = [0]
    for atom in atoms:
        numbers += [number | bits[atom] for number in numbers]
    return numbers


def _digest(atom: Atom) -> bytes:
    """Of what an atom says, however it was written."""
    if isinstance(atom, IdSet):
        return hashlib.sha256(b"ids\0" + _packed(edge for one in atom.ranges for edge in one)).digest()
    told = hashlib.sha256(b"between\0" + struct.pack("<??", atom.is_open, atom.looks_back))
    for some in (atom.opens, atom.closes):
        told.update(struct.pack("<i", len(set(some))))
        for one in sorted(set(some)):
            told.update(struct.pack("<i", len(one)) + _packed(one))
    return told.digest()


def _packed(numbers: Iterable[int]) -> bytes:
    return b"".join(struct.pack("<q", number) for number in numbers)
