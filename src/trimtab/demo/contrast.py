"""Contrasting prompts: pairs of reviews that differ in one feature and share all that the grammar lets them share."""

import random
from typing import Literal

from trimtab.demo.grammar import FORMALITIES, SENTIMENTS, sample_review, telling_header
from trimtab.demo.reviews import TOPICS

Feature = Literal["sentiment", "formality"]


def contrasting_prompts(feature: Feature, pairs: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """`pairs` reviews with, and as many without: (positive, negative) or (formal, informal).

    The two reviews of a pair have the topic, the header, the number of sentences and the other feature in common, so
    that the mean difference of their activations is the feature alone.
    """
    rng = random.Random(f"{feature} {seed}")
    values = SENTIMENTS if feature == "sentiment" else FORMALITIES
    others = FORMALITIES if feature == "sentiment" else SENTIMENTS
    sides: tuple[list[str], list[str]] = [], []
    for index in range(pairs):
        topic, other, sentences, twin = rng.choice(TOPICS), others[index % 2], rng.randint(1, 2), rng.random()
        for side, value in zip(sides, values, strict=True):
            sentiment, formality = (value, other) if feature == "sentiment" else (other, value)
            header = telling_header(topic, **{feature: value})
            review = sample_review(
                random.Random(twin),
                topic=topic,
                sentiment=sentiment,
                formality=formality,
                sentences=sentences,
                header=header,
            )
            side.append(review.text)
    return sides
