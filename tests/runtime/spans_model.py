"""A slow and obvious model of requests with spans, and of an engine that runs them in any order.

Which program a token is due follows here from the whole text up to it, each time anew. Nothing is shared with the code
under test but the classes in which a request is said.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.program.spans import Between, IdSet, Spans
from trimtab.sites import Phase

VOCABULARY = 4


def due(spans: Spans, text: Sequence[int], position: int) -> int:
    """The program of the token of `text` at `position`."""
    run = max(place for place, start in enumerate(spans.starts) if start <= position)
    choice = spans.choices[spans.kinds[run]]
    if len(choice) == 1:
        return choice[0]
    said = [says(atom, list(text[: position + 1]), spans.prompt_length) for atom in spans.atoms]
    return choice[sum(2**place for place, yes in enumerate(said) if yes)]


def says(atom: IdSet | Between, text: list[int], prompt: int) -> bool:
    """What an atom says of the last token of `text`, one of the answer."""
    if isinstance(atom, IdSet):
        return any(low <= text[-1] < high for low, high in atom.ranges)
    is_open, complete = atom.is_open, False
    for end in range(prompt + 1, len(text) + 1):
        behind = text[:end] if atom.looks_back else text[prompt:end]
        complete = False
        for sequences, becomes in ((atom.opens, True), (atom.closes, False)):  # closing has the last word
            for sequence in sequences:
                if len(behind) >= len(sequence) and behind[len(behind) - len(sequence) :] == list(sequence):
                    is_open, complete = becomes, True
    return is_open and not complete


def random_spans(rng: np.random.Generator, prompt: int) -> Spans:
    """Any runs, in prompt and answer, of any programs; up to four atoms."""
    atoms = tuple(random_atom(rng) for _ in range(rng.integers(1, 5) * (rng.random() < 0.8)))
    prompts, answers = (int(rng.integers(1, 5)) for _ in range(2))
    phases = (*[Phase.PREFILL] * prompts, *[Phase.DECODE] * answers)
    own, others = range(prompts), range(prompts, prompts + answers)
    choices = [(int(rng.choice(own)),) for _ in range(3)]
    decided = [tuple(map(int, rng.choice(others, 2 ** len(atoms)))) for _ in range(3)]
    choices += [one if rng.random() < 0.85 else one[:1] for one in decided]
    starts = sorted({0, prompt, *map(int, rng.integers(1, prompt + 40, rng.integers(0, 9)))})
    kinds = [int(rng.integers(0, 3)) + 3 * (start >= prompt) for start in starts]
    return Spans(prompt, tuple(starts), tuple(kinds), tuple(choices), phases, atoms)


def random_atom(rng: np.random.Generator) -> IdSet | Between:
    if rng.random() < 0.3:
        edges = sorted(map(int, rng.choice(VOCABULARY + 1, 2, replace=False)))
        return IdSet((tuple(edges),))
    opens, closes = ([random_sequence(rng) for _ in range(rng.integers(0, 4))] for _ in range(2))
    if not (opens or closes):
        opens = [random_sequence(rng)]
    return Between(tuple(opens), tuple(closes), bool(rng.integers(2)), bool(rng.integers(2)))


def random_sequence(rng: np.random.Generator) -> tuple[int, ...]:
    length = int(rng.integers(1, 4) if rng.random() < 0.7 else rng.integers(4, 17))
    return tuple(map(int, rng.integers(0, VOCABULARY, length)))


@dataclass
class Life:
    """A request as its engine sees it."""

    name: str
    prompt: int
    text: list[int]  # prompt and answer, the tokens that are to stay
    spans: Spans | None = None
    steering: Any = None
    computed: int = 0  # of the text
    ahead: list[int] = field(default_factory=list)  # tokens that it is going to say


@dataclass(frozen=True)
class Part:
    """One request's tokens of a pass."""

    life: Life
    first: int
    tokens: list[int]  # drafts, too
    known: int  # where the host believes that they begin

    def text(self) -> list[int]:
        """The text up to the last of them."""
        return self.life.text[: self.first] + self.tokens


class Engine:
    """Schedules at random: chunks of any size, several tokens a step of which some are rejected, preemption, prefix
    hits, tokens computed again. Calls `join(life, upto)` and `leave(life)`; yields the parts of each pass."""

    def __init__(self, rng: np.random.Generator, new: Any, join: Any, leave: Any, most: int = 4) -> None:
        self._rng, self._new, self._join, self._leave, self._most = rng, new, join, leave, most
        self._running: list[Life] = []
        self._waiting: list[Life] = []

    def passes(self, number: int) -> Iterator[list[Part]]:
        rng = self._rng
        for _ in range(number):
            self._come_and_go()
            batch = [life for life in self._running if rng.random() < 0.85]
            if rng.random() < 0.2:
                rng.shuffle(batch)
            parts = [self._part(life) for life in batch]
            yield parts
            for part in parts:
                self._take(part)

    def _come_and_go(self) -> None:
        rng = self._rng
        for life in list(self._running):
            luck = rng.random()
            if luck < 0.03 or len(life.text) > life.prompt + 160:
                self._running.remove(life)
                self._leave(life)
            elif luck < 0.07:  # preempted
                self._running.remove(life)
                self._leave(life)
                self._waiting.append(life)
        while len(self._running) < self._most and rng.random() < 0.5:
            life = self._waiting.pop(0) if self._waiting and rng.random() < 0.7 else self._new()
            hit = int(rng.integers(0, len(life.text)))
            life.computed = (0, hit // 4 * 4, hit, len(life.text) - 1)[int(rng.integers(4))]
            self._running.append(life)
            self._join(life, life.computed)

    def _part(self, life: Life) -> Part:
        rng, left = self._rng, len(life.text) - life.computed
        if left > 1:
            tokens = life.text[life.computed : life.computed + int(rng.integers(1, left + 1))]
            return Part(life, life.computed, tokens, life.computed)
        drafts = [self._say(life) for _ in range(int(rng.integers(0, 6)) * int(rng.random() < 0.6))]
        believed = life.computed + int(rng.integers(0, 4)) * (life.computed > life.prompt)
        return Part(life, life.computed, [life.text[-1], *drafts], believed)

    def _take(self, part: Part) -> None:
        life = part.life
        if part.first + len(part.tokens) <= len(life.text):  # of a prompt, or computed again
            life.computed += len(part.tokens)
            if life.computed == len(life.text):
                life.text.append(self._say(life))
            return
        drafts = part.tokens[1:]
        accepted = int(self._rng.integers(0, len(drafts) + 1))
        life.ahead = life.ahead if accepted == len(drafts) else []
        life.text += [*drafts[:accepted], self._say(life)]
        life.computed += 1 + accepted

    def _say(self, life: Life) -> int:
        """The next token: often one of a sequence that an atom waits for."""
        if not life.ahead and life.spans is not None and self._rng.random() < 0.3:
            sequences = [
                sequence
                for atom in life.spans.atoms
                if isinstance(atom, Between)
                for sequence in (*atom.opens, *atom.closes)
            ]
            if sequences:
                life.ahead = list(sequences[int(self._rng.integers(len(sequences)))])
        return life.ahead.pop(0) if life.ahead else int(self._rng.integers(0, VOCABULARY))


def new_text(rng: np.random.Generator, prompt: int, spans: Spans | None) -> list[int]:
    """A prompt that may end with the beginning of a sequence, or with all of one."""
    text = [int(token) for token in rng.integers(0, VOCABULARY, prompt)]
    atoms = [] if spans is None else [atom for atom in spans.atoms if isinstance(atom, Between)]
    if atoms and rng.random() < 0.5:
        sequences = [*atoms[0].opens, *atoms[0].closes]
        begun = sequences[0][: int(rng.integers(1, len(sequences[0]) + 1))]
        text[prompt - min(prompt, len(begun)) :] = begun[-prompt:]
    return text
