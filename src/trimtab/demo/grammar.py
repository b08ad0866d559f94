"""A grammar of short reviews whose sentiment and formality are independent: it writes the corpus and scores text.

Notation, one line per production set (`reviews.py` holds the productions):

    NAME[tag tag]: alternative @weight | alternative | ...

An alternative is a sequence of words, punctuation marks and NAMES of other productions (capitals, two letters at
least). Tags say what using the production makes of the sentence: `pos` or `neg` (sentiment), `formal` or `informal`
(formality), or a topic. The productions used in one sentence must agree, so "the soup was yummy and the bread was cold"
is no sentence of the language: nothing in it is both. What no production decides stays open (`None`).
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from trimtab.demo.reviews import HEADERS, TELLING_HEADERS, TOPICS, productions

SENTIMENTS = ("positive", "negative")
FORMALITIES = ("formal", "informal")

_TAGS = {"pos": ("sentiment", "positive"), "neg": ("sentiment", "negative")}
_TAGS |= {formality: ("formality", formality) for formality in FORMALITIES} | {
    topic: ("topic", topic) for topic in TOPICS
}
_NAME = re.compile(r"[A-Z]{2}[A-Z0-9]*(?:-[A-Z0-9]+)*")
_TOKEN = re.compile(r"[A-Za-z'-]+|[.,!?:]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PROPER = {"I", "Sunday", "March", "June", "October"}


class Features(NamedTuple):
    """What the productions of a sentence say of it; None where none of them says anything."""

    sentiment: str | None = None
    formality: str | None = None
    topic: str | None = None

    def join(self, other: "Features") -> "Features | None":
        """Both at once, or None where they contradict each other."""
        joined = []
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None and theirs is not None and mine != theirs:
                return None
            joined.append(mine if mine is not None else theirs)
        return Features(*joined)


@dataclass(frozen=True)
class Production:
    """One alternative: `name` may be rewritten to `parts` (words and names), which says `features` of the sentence."""

    name: str
    parts: tuple[str, ...]
    features: Features
    weight: float


class Grammar:
    """A feature grammar without recursion, read from the notation above; `ValueError` on what it cannot read."""

    def __init__(self, text: str, start: str = "SENTENCE") -> None:
        self.start = start
        self._productions: dict[str, list[Production]] = {}
        for line in filter(None, map(str.strip, text.splitlines())):
            for production in _read_line(line):
                self._productions.setdefault(production.name, []).append(production)
        used = {part for production in self for part in production.parts if _is_name(part)}
        if missing := sorted((used | {start}) - set(self._productions)):
            raise ValueError(f"productions use names that nothing defines: {', '.join(missing)}")
        self._usable: dict[tuple[Production, Features], bool] = {}

    def __iter__(self) -> Iterator[Production]:
        return (production for alternatives in self._productions.values() for production in alternatives)

    def sample(self, features: Features, rng: random.Random) -> str:
        """One sentence whose productions all agree with `features`."""
        return _render(self._rewrite(self.start, features, rng))

    def parse(self, sentence: str) -> set[Features]:
        """The features of every derivation of `sentence`; empty if the grammar does not know it."""
        tokens = _TOKEN.findall(sentence)
        if _render(tokens) != sentence:  # wrong spaces, capitals or signs
            return set()
        tokens = [token if token in _PROPER else _lower_first(token) for token in tokens[:1]] + tokens[1:]

        @cache
        def spans(name: str, begin: int) -> frozenset[tuple[int, Features]]:
            found: set[tuple[int, Features]] = set()
            for production in self._productions[name]:
                partial = {(begin, production.features)}
                for part in production.parts:
                    partial = set(_advance(partial, part))
                    if not partial:
                        break
                found |= partial
            return frozenset(found)

        def _advance(partial: set[tuple[int, Features]], part: str) -> Iterator[tuple[int, Features]]:
            named = part in self._productions
            for end, features in partial:
                if not named:
                    if end < len(tokens) and tokens[end] == part:
                        yield end + 1, features
                    continue
                for further, inner in spans(part, end):
                    if (joined := features.join(inner)) is not None:
                        yield further, joined

        return {features for end, features in spans(self.start, 0) if end == len(tokens)}

    def _rewrite(self, name: str, wanted: Features, rng: random.Random) -> list[str]:
        usable = [production for production in self._productions[name] if self._agrees(production, wanted)]
        if not usable:
            raise ValueError(f"no production of {name} agrees with {wanted}")
        chosen = rng.choices(usable, [production.weight for production in usable])[0]
        words: list[str] = []
        for part in chosen.parts:
            words += self._rewrite(part, wanted, rng) if _is_name(part) else [part]
        return words

    def _agrees(self, production: Production, wanted: Features) -> bool:
        """Whether the production, and at least one way to rewrite each of its parts, agrees with `wanted`."""
        key = production, wanted
        if key not in self._usable:
            self._usable[key] = wanted.join(production.features) is not None and all(
                any(self._agrees(inner, wanted) for inner in self._productions[part])
                for part in production.parts
                if _is_name(part)
            )
        return self._usable[key]


class Reading(NamedTuple):
    """How the grammar reads one sentence. Not `parsed`: it has no derivation. An ambiguous feature is None."""

    parsed: bool
    sentiment: str | None = None
    formality: str | None = None


class Shares(NamedTuple):
    """Measured shares of a set of sentences, each in [0, 1]; NaN where nothing could be counted."""

    sentences: int
    parsed: float  # of all sentences
    positive: float  # of the parsed ones that have a sentiment
    formal: float  # of the parsed ones that have a formality


@dataclass(frozen=True)
class Review:
    """A sampled review: a header and sentences that share topic, sentiment and formality."""

    header: str
    sentences: tuple[str, ...]
    features: Features

    @property
    def text(self) -> str:
        return " ".join((self.header, *self.sentences))


@cache
def review_grammar() -> Grammar:
    """The grammar of the demonstration's reviews."""
    return Grammar(productions())


def headers(topics: Sequence[str] = TOPICS) -> list[str]:
    """Every neutral beginning of a review ("Review of the film:"), grouped by wording."""
    return [header.format(topic) for header in HEADERS for topic in topics]


def telling_header(topic: str, sentiment: str | None = None, formality: str | None = None) -> str:
    """The beginning that says this sentiment, this formality, or both ("Formal complaint about the film:")."""
    return dict(TELLING_HEADERS)[sentiment, formality].format(topic)


def sample_review(
    rng: random.Random,
    *,
    topic: str | None = None,
    sentiment: str | None = None,
    formality: str | None = None,
    sentences: int | None = None,
    header: str | None = None,
) -> Review:
    """A review with the given features and number of sentences (2 to 4); what is None is drawn, each on its own.

    Two headers in five are neutral; the others say the sentiment, the formality, or both.
    """
    features = Features(
        sentiment or rng.choice(SENTIMENTS), formality or rng.choice(FORMALITIES), topic or rng.choice(TOPICS)
    )
    says_sentiment, says_formality = rng.choice(
        ((False, False), (False, False), (True, False), (False, True), (True, True))
    )
    wording = rng.choice(HEADERS)
    if header is None and (says_sentiment or says_formality):
        header = telling_header(
            str(features.topic),
            features.sentiment if says_sentiment else None,
            features.formality if says_formality else None,
        )
    count = sentences or rng.randint(2, 4)
    body = tuple(review_grammar().sample(features, rng) for _ in range(count))
    return Review(header or wording.format(features.topic), body, features)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, by their closing mark; a last one without a mark is kept."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]


@cache
def read_sentence(sentence: str) -> Reading:
    """What the productions make of one sentence."""
    derivations = review_grammar().parse(sentence)
    if not derivations:
        return Reading(False)
    sentiments, formalities, _ = (set(values) for values in zip(*derivations, strict=True))
    return Reading(True, _only(sentiments), _only(formalities))


def measure(sentences: Sequence[str]) -> Shares:
    """Shares over sentences, by the grammar's reading of each."""
    readings = [read_sentence(sentence) for sentence in sentences]
    return Shares(
        len(readings),
        _share([reading.parsed for reading in readings]),
        _share([reading.sentiment == "positive" for reading in readings if reading.sentiment]),
        _share([reading.formality == "formal" for reading in readings if reading.formality]),
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else float("nan")


def _only(values: set[str | None]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def _read_line(line: str) -> Iterator[Production]:
    head, colon, body = line.partition(": ")
    match = re.fullmatch(rf"({_NAME.pattern})(?:\[([a-z ]+)\])?", head)
    if not colon or not match:
        raise ValueError(f"{line!r} is no production: expected NAME[tags]: alternative | alternative")
    unknown = [tag for tag in (match[2] or "").split() if tag not in _TAGS]
    if unknown:
        raise ValueError(f"{line!r} has an unknown tag {unknown[0]!r}: expected one of {', '.join(_TAGS)}")
    features = Features(**dict(_TAGS[tag] for tag in (match[2] or "").split()))
    for alternative in body.split(" | "):
        words, _, weight = alternative.partition(" @")
        yield Production(match[1], tuple(words.split()), features, float(weight or 1))


def _is_name(part: str) -> bool:
    return _NAME.fullmatch(part) is not None


def _render(words: Sequence[str]) -> str:
    text = re.sub(r" ([.,!?:])", r"\1", " ".join(words))
    return text[:1].upper() + text[1:]


def _lower_first(word: str) -> str:
    return word[:1].lower() + word[1:]
