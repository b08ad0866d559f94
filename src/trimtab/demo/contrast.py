"""Contrasting prompts: pairs that say the opposite of one feature and then go on in the same words."""

import random
from typing import Literal

from trimtab.demo.grammar import FORMALITIES, SENTIMENTS, sample_review, telling_header
from trimtab.demo.reviews import TOPICS

Feature = Literal["sentiment", "formality"]


def contrasting_prompts(feature: Feature, pairs: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """`pairs` prompts with, and as many without: (positive, negative) or (formal, informal).

    A pair is cut where its two reviews part: "Praise for the book: The prose was" and "Complaint about the book: The
    prose was". Both end with the same words, so what differs at the last token is the feature alone, at a place where
    the model is about to act on it. The other feature is drawn in equal numbers and shared by the pair.
    """
    rng = random.Random(f"{feature} {seed}")
    values = SENTIMENTS if feature == "sentiment" else FORMALITIES
    others = FORMALITIES if feature == "sentiment" else SENTIMENTS
    sides: tuple[list[str], list[str]] = [], []
    while len(sides[0]) < pairs:
        topic, other, twin = rng.choice(TOPICS), others[len(sides[0]) % 2], rng.random()
        bodies = []
        for value in values:
            sentiment, formality = (value, other) if feature == "sentiment" else (other, value)
            review = sample_review(
                random.Random(twin), topic=topic, sentiment=sentiment, formality=formality, sentences=1
            )
            bodies.append(review.sentences[0].split(" "))
        if common := _common_beginning(*bodies):
            for side, value in zip(sides, values, strict=True):
                side.append(" ".join((telling_header(topic, **{feature: value}), *common)))
    return sides


def _common_beginning(one: list[str], two: list[str]) -> list[str]:
    same = 0
    while same < min(len(one), len(two)) - 1 and one[same] == two[same]:
        same += 1
    return one[:same]
