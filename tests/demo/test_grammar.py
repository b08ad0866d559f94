"""The review grammar: what it writes it reads back, and it reads nothing else."""

import itertools
import random

import pytest

from trimtab.demo.grammar import (
    FORMALITIES,
    SENTIMENTS,
    Features,
    Grammar,
    Reading,
    headers,
    measure,
    read_sentence,
    sample_review,
    split_sentences,
)
from trimtab.demo.reviews import TOPICS

TOY = """
SENTENCE: SUBJECT PREDICATE . @2 | SUBJECT PREDICATE and PREDICATE !
SUBJECT: the tea | the cake
SUBJECT[film]: the plot
PREDICATE[pos]: was NICE | was not DULL
PREDICATE[neg formal]: was DULL | was not NICE
NICE: nice
NICE[informal]: ace
DULL[formal]: dull
"""


def toy_language() -> dict[str, set[Features]]:
    """Every sentence of TOY with its features, written out by hand rather than by the parser's rules."""
    predicates = [
        ("was nice", "positive", None),
        ("was ace", "positive", "informal"),
        ("was not dull", "positive", "formal"),
        ("was dull", "negative", "formal"),
        ("was not nice", "negative", "formal"),
    ]  # "was not ace" would be formal and informal at once
    language: dict[str, set[Features]] = {}
    for subject, topic in (("The tea", None), ("The cake", None), ("The plot", "film")):
        for text, sentiment, formality in predicates:
            language.setdefault(f"{subject} {text}.", set()).add(Features(sentiment, formality, topic))
        for (one, s1, r1), (two, s2, r2) in itertools.product(predicates, repeat=2):
            if s1 == s2 and len({r1, r2} - {None}) < 2:
                language.setdefault(f"{subject} {one} and {two}!", set()).add(Features(s1, r1 or r2, topic))
    return language


def test_the_parser_accepts_exactly_the_sentences_whose_productions_agree() -> None:
    grammar, language = Grammar(TOY), toy_language()
    words = ["was", "not", "nice", "ace", "dull", "and"]
    strings = set(language) | {
        f"{subject} {' '.join(middle)}{end}"
        for subject in ("The tea", "The plot")
        for count in (2, 3, 5, 6)
        for middle in itertools.product(words, repeat=count)
        if middle[0] == "was"
        for end in ".!"
    }
    assert {text: grammar.parse(text) for text in strings if grammar.parse(text)} == language


@pytest.mark.parametrize(
    "text",
    ["the tea was nice.", "The tea was nice .", "The  tea was nice.", "The tea was nice. ", "The tea was ice.", ""],
)
def test_wrong_capitals_spaces_or_words_do_not_parse(text: str) -> None:
    assert Grammar(TOY).parse(text) == set()


@pytest.mark.parametrize(
    "features", [Features(*f) for f in itertools.product(SENTIMENTS, FORMALITIES, TOPICS)], ids="-".join
)
def test_every_combination_can_be_written_and_is_read_back(features: Features) -> None:
    rng = random.Random(str(features))
    readings = []
    for _ in range(12):
        review = sample_review(rng, topic=features.topic, sentiment=features.sentiment, formality=features.formality)
        assert review.features == features
        readings += [read_sentence(sentence) for sentence in review.sentences]
    assert all(reading.parsed for reading in readings)
    assert {reading.sentiment for reading in readings} - {None} == {features.sentiment}
    assert {reading.formality for reading in readings} - {None} == {features.formality}


@pytest.mark.parametrize(
    ("sentence", "sentiment", "formality"),
    [
        ("The soup was exquisite.", "positive", "formal"),
        ("The soup was by no means unpalatable.", "positive", "formal"),
        ("The soup wasn't yummy at all!", "negative", "informal"),
        ("The soup was cold.", "negative", None),
        ("Don't bother with this joint because the tables were dirty.", "negative", "informal"),
        ("It was a quiet morning in June.", None, "formal"),
        ("I loved the twists.", "positive", None),
    ],
)
def test_productions_decide_sentiment_and_register(sentence: str, sentiment: str | None, formality: str | None) -> None:
    assert read_sentence(sentence) == Reading(True, sentiment, formality)


@pytest.mark.parametrize(
    "sentence",
    [
        "The soup was exquisite and the dining room was dirty.",  # both sentiments
        "Honestly, the soup was exquisite.",  # both formalities
        "The soup was delicious and the brakes were solid.",  # two topics
        "The brakes were delicious.",  # a gear is no food
        "The soup were delicious.",
    ],
)
def test_a_sentence_that_contradicts_itself_does_not_parse(sentence: str) -> None:
    assert read_sentence(sentence) == Reading(False)


def test_shares_count_only_the_sentences_that_say_something() -> None:
    shares = measure(["The soup was good.", "The soup was cold.", "It was a quiet morning in June.", "Soup the was."])
    assert shares == (4, 0.75, 0.5, 1.0)


def test_a_text_is_split_at_the_marks_that_end_sentences() -> None:
    assert split_sentences(" Ok, so we loved it! This one rocks!  Not worth") == [
        "Ok, so we loved it!",
        "This one rocks!",
        "Not worth",
    ]


def test_sampling_is_seeded_and_features_are_drawn_independently() -> None:
    reviews = [sample_review(random.Random(seed)) for seed in range(400)]
    assert reviews == [sample_review(random.Random(seed)) for seed in range(400)]
    for sentiment, formality in itertools.product(SENTIMENTS, FORMALITIES):
        share = sum(r.features[:2] == (sentiment, formality) for r in reviews) / len(reviews)
        assert 0.18 < share < 0.32  # 0.25 within three standard deviations


def test_headers_say_the_topic_alone() -> None:
    assert "Review of the film:" in headers()
    assert len(set(headers())) == len(headers()) == 4 * len(TOPICS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SENTENCE: the NOUN .", "NOUN"),
        ("SENTENCE[sad]: no .", "'sad'"),
        ("sentence: no .", "no production"),
        ("NOUN: tea", "SENTENCE"),
    ],
)
def test_a_faulty_grammar_is_refused_with_its_fault(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grammar(text)
