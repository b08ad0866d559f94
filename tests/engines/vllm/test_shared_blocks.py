"""Two requests share a cached block if and only if nothing that its KV depends on differs.

The slow model looks at every position by itself. What a token there received is the identity of the program that it
got; of one that follows a schedule, with the token's place in the answer. Where the answer's own tokens decide, it is a
whole table, by all that could be said of a token, and the position at which the answer begins: two requests of
different tables, or whose answers begin elsewhere, are apart even if the tokens at hand happen to give the same. That
is what "needlessly" means here: equal tokens, equal tables, and yet apart. "Wrongly" is measured by what tokens really
received.

Requests come in families of one conversation: with prompts of different lengths (an answer that is sent again is part
of one), cut off early, now and then with another token, and steered in ways that mostly agree.
"""

import itertools
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

from trimtab.engines.vllm.carried import Carried
from trimtab.engines.vllm.core.cache_keys import steering_keys
from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Spans, Term
from trimtab.program.joint_gate import scheduled
from trimtab.program.schedules import Schedule
from trimtab.program.spans import Atom, Between, IdSet
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors.vector import SteeringVector

PAIRS, FAMILY = 100_000, 46

VECTOR = SteeringVector({Site(0, HookPoint.POST_BLOCK): [1.0, 2.0]})
SITE = VECTOR.sites[0]
PROGRAMS = [EMPTY, *(PhaseProgram.of([Term(VECTOR, scale)]) for scale in (1.0, 1.0, 2.0))]  # two are equal
FADING = len(PROGRAMS)  # one by a schedule: of an answer alone
PROGRAMS.append(PhaseProgram.of([Term(VECTOR, 1.0, gate=scheduled(None, Schedule.decay(0.9), SITE, 2))]))

OPEN = Between(((7, 8),), ((9,),))
ATOMS: list[Atom] = [
    IdSet(((8, 9),)),
    IdSet(((7, 8), (9, 10))),
    OPEN,
    Between(((7, 8),), ((9,),), is_open=True),
    Between(((7, 8),), ((9,),), looks_back=True),
    Between((), ((9, 9), (8,)), is_open=True),
]


EACH = range(len(ATOMS))


@dataclass(frozen=True)
class Choice:
    """What tokens of a run receive: one of `PROGRAMS`, or by what some of `ATOMS` say one of several."""

    programs: tuple[int, ...]
    atoms: tuple[int, ...] = ()

    def of(self, said: Sequence[bool]) -> int:
        """The program by what each of `ATOMS` says."""
        return self.programs[sum(said[atom] << place for place, atom in enumerate(self.atoms))]

    @property
    def of_answers(self) -> bool:
        """Whether it matters where the answer begins."""
        return isinstance(self.table, tuple) or FADING in self.programs

    @cached_property
    def table(self) -> str | tuple[str, ...]:
        """The identities by all that could be said; one where they are all the same."""
        all_that_could_be = itertools.product((False, True), repeat=len(ATOMS))
        table = tuple(PROGRAMS[self.of(said)].identity for said in all_that_could_be)
        return table[0] if len({*table}) == 1 else table


NOTHING, FIRST, EQUAL, SECOND = (Choice((place,)) for place in range(4))
PLAIN = [NOTHING, FIRST, EQUAL, SECOND]
DECIDED = [
    Choice((0, 1), (0,)), Choice((0, 2), (0,)), Choice((0, 0, 1, 1), (1, 0)), Choice((1, 0), (0,)),
    Choice((1, 2), (0,)), Choice((0, 1), (1,)), Choice((0, 1), (2,)), Choice((0, 1), (3,)), Choice((0, 1), (4,)),
    Choice((0, 1), (5,)), Choice((FADING,)), Choice((0, FADING), (0,)), Choice((0, 1, 3, 3), (0, 2)),
    Choice((0, 3, 1, 3), (2, 0)), Choice((0, 1, 1, 0), (0, 3)),
]  # fmt: skip


class Asked(NamedTuple):
    """A request: the length of its prompt, its tokens, and what those of each run receive."""

    prompt: int
    tokens: tuple[int, ...]
    runs: tuple[tuple[int, Choice], ...]
    steering: ResolvedSteering | None

    def choice(self, position: int) -> Choice:
        """What the token at `position` receives."""
        return self.runs[bisect_right(self.runs, position, key=lambda run: run[0]) - 1][1]


def test_requests_share_a_block_if_and_only_if_all_that_it_depends_on_is_equal() -> None:
    generator = random.Random(0)
    seen: Counter[str] = Counter()
    while seen["pairs"] < PAIRS:
        block = generator.choice((1, 2, 3, 4, 5, 8, 16))
        family = list(requests(generator))
        hashes, models, truths = (chained([in_blocks(part(one, block), block) for one in family]) for part in VIEWS)
        decided = [first_decided(request) // block for request in family]
        for one, other in itertools.combinations(range(len(family)), 2):
            shared, same, real = (common(of[one], of[other]) for of in (hashes, models, truths))
            assert same <= real, "the model says more than what was received"
            seen["pairs"] += 1
            seen["shared"] += shared
            seen["wrongly"] += shared > real
            seen["needlessly"] += shared < same
            seen["apart"] += shared < min(len(hashes[one]), len(hashes[other])) - 1
            seen["decided and shared"] += shared > max(decided[one], decided[other])
    assert seen["wrongly"] == 0, seen
    assert seen["needlessly"] == 0, seen
    assert min(seen["shared"], 2 * seen["apart"], 50 * seen["decided and shared"]) > PAIRS, seen


def in_blocks(parts: Sequence[Any], block: int) -> Iterator[Any]:
    """What is said of positions, together for each full block."""
    return (tuple(parts[end - block : end]) for end in range(block, len(parts) + 1, block))


def chained(family: Iterable[Iterable[Any]]) -> list[list[int]]:
    """For each request and block a number for all up to its end: a chain of hashes that never collide."""
    numbers: dict[Any, int] = {}

    def after(before: int, part: Any) -> int:
        return numbers.setdefault((before, part), len(numbers))

    return [list(itertools.accumulate(parts, after, initial=-1)) for parts in family]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many blocks are the same from the start on."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)) - 1


def first_decided(request: Asked) -> int:
    return next((p for p in range(len(request.tokens)) if request.choice(p).of_answers), 1 << 30)


def hashed(request: Asked, block: int) -> list[Any]:
    """What vLLM hashes: tokens, and the extra keys of each block, which stand at its last one here."""
    extra = None if request.steering is None else {"steering": Carried({}, request.steering)}
    given = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), num_prompt_tokens=request.prompt)
    edges = {end - 1: steering_keys(given, end - block, end) for end in range(block, len(request.tokens) + 1, block)}
    return [(token, edges.get(position)) for position, token in enumerate(request.tokens)]


def defined(request: Asked, block: int) -> list[Any]:
    """What the KV of each position is said to depend on."""
    choices = [request.choice(position) for position in range(len(request.tokens))]
    told = [(choice.table, request.prompt if choice.of_answers else None) for choice in choices]
    return list(zip(request.tokens, told, strict=True))


def received(request: Asked, block: int) -> list[Any]:
    """What it really depends on."""
    said = zip(*(say(atom, request) for atom in ATOMS), strict=True)
    chosen = [request.choice(position).of(one) for position, one in enumerate(said)]
    places = (position - request.prompt if place == FADING else None for position, place in enumerate(chosen))
    identities = (PROGRAMS[place].identity for place in chosen)
    return list(zip(request.tokens, identities, places, strict=True))


TOO_EARLY = (FADING, Phase.PREFILL)
VIEWS = hashed, defined, received


def say(atom: Atom, request: Asked) -> Iterator[bool]:
    """What an atom says of each token, by looking at the text before it."""
    is_open = isinstance(atom, Between) and atom.is_open
    for position, token in enumerate(request.tokens):
        if position < request.prompt:
            yield False
        elif isinstance(atom, IdSet):
            yield any(first <= token < end for first, end in atom.ranges)
        else:
            text = "".join(map(str, request.tokens[0 if atom.looks_back else request.prompt : position + 1]))
            opens, closes = (
                text.endswith(tuple("".join(map(str, one)) for one in some)) for some in (atom.opens, atom.closes)
            )
            yield is_open and not (opens or closes)
            is_open = (is_open or opens) and not closes


def requests(generator: random.Random) -> Iterator[Asked]:
    """A family."""
    conversation = [generator.choice((3, 7, 7, 8, 8, 9)) for _ in range(40)]
    edges = sorted({0, *(generator.randrange(40) for _ in range(4))})
    usual = [(edge, generator.choice(PLAIN)) for edge in edges]
    some = generator.randrange(len(DECIDED) - 2)
    favourites = DECIDED[some : some + 3]  # which are much alike
    lengths = [generator.randrange(1, 30) for _ in range(3)]
    cuts = [place for place in range(1, 30) if conversation[place - 1 : place + 1] == [7, 8]]
    lengths[0] = generator.choice(cuts or lengths)  # where the answer begins within a sequence that opens
    for _ in range(FAMILY):
        tokens = conversation[: generator.choice((40, 40, 40, generator.randrange(1, 41)))]
        if generator.random() < 0.1:
            tokens[generator.randrange(len(tokens))] = generator.choice((3, 7, 8, 9))
        prompt = min(generator.choice((*lengths, lengths[0])), len(tokens))
        if generator.random() < 0.2:
            yield by_phase(prompt, tuple(tokens), generator)
            continue
        runs = dict(usual)
        if generator.random() < 0.3:
            runs[generator.choice((*edges, generator.randrange(40)))] = generator.choice(PLAIN)
        if generator.random() < 0.8:  # tokens decide, from some token of the answer on
            runs[prompt + generator.choice((0, 0, 0, 3))] = generator.choice((*favourites, favourites[0]))
            if generator.random() < 0.3:
                runs[prompt + generator.choice((1, 5, 8))] = generator.choice((*favourites, FIRST))
        yield spanned(prompt, tuple(tokens), runs, generator)


def by_phase(prompt: int, tokens: tuple[int, ...], generator: random.Random) -> Asked:
    """A request that says no more than phases, or nothing."""
    chosen = [generator.choice(PLAIN) for _ in Phase]
    steering = ResolvedSteering(tuple(PROGRAMS[one.programs[0]] for one in chosen))
    unsteered = generator.random() < 0.3
    runs = ((0, NOTHING if unsteered else chosen[0]), (prompt, NOTHING if unsteered else chosen[1]))
    return Asked(prompt, tokens, runs, None if unsteered else steering)


def spanned(prompt: int, tokens: tuple[int, ...], runs: dict[int, Choice], generator: random.Random) -> Asked:
    """A request of these runs, written in a random one of the ways in which they can be."""
    ordered = sorted(runs.items())
    cut = {start: choice for start, choice in ordered if start >= prompt or not choice.of_answers}
    before = [choice for start, choice in sorted(cut.items()) if start <= prompt]
    cut.setdefault(0, NOTHING)
    cut.setdefault(prompt, before[-1] if before else NOTHING)
    atoms = sorted({atom for choice in cut.values() for atom in choice.atoms})
    atoms += [atom for atom in range(len(ATOMS)) if atom not in atoms][: generator.randrange(2)]  # one for nothing
    generator.shuffle(atoms)
    if len(atoms) > 4:
        return spanned(prompt, tokens, {0: FIRST}, generator)
    places = [(place, phase) for place in range(len(PROGRAMS)) for phase in Phase if (place, phase) != TOO_EARLY]
    generator.shuffle(places)
    choices: list[tuple[int, ...]] = []
    for start, choice in sorted(cut.items()):
        phase = Phase.PREFILL if start < prompt else Phase.DECODE
        numbers = range(1 << len(atoms) if choice.atoms else 1)
        chosen = (choice.of([a in atoms and bool(number >> atoms.index(a) & 1) for a in EACH]) for number in numbers)
        choices.append(tuple(places.index((place, phase)) for place in chosen))
    spans = Spans(
        prompt,
        tuple(sorted(cut)),
        tuple(range(len(choices))),
        tuple(choices),
        tuple(phase for _, phase in places),
        tuple(ATOMS[atom] for atom in atoms),
    )
    steering = ResolvedSteering(tuple(PROGRAMS[place] for place, _ in places), spans=spans)
    return Asked(prompt, tokens, tuple(sorted(cut.items())), steering)
