"""The demonstration's measurements: one mixed batch of columns, and a sweep of strengths.

Everything is sampled, with one seed. Sampling draws row by row from one stream, so an unsteered row of a mixed batch
must come out as the plain model's row of an equally large batch does, token by token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trimtab.demo import model_path
from trimtab.demo.contrast import Feature, contrasting_prompts
from trimtab.demo.grammar import Shares, headers, measure, read_sentence, split_sentences
from trimtab.engines.transformers import SteeredModel
from trimtab.training.extraction import extract_vector
from trimtab.training.statistics import Interval, share_interval
from trimtab.vectors import SteeringVector

LAYERS = (2,)
PAIRS = 96
STRENGTH = {"sentiment": 0.6, "formality": 0.25}  # in mean differences
SWEEP = (-1.5, -1.25, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # in multiples of STRENGTH
COPIES = 6  # of each header in every column
SWEEP_COPIES = 6  # of each header at every strength
USEFUL = 1.0  # strengths up to here do all that is asked of a vector; those beyond show what too much does
CONFIDENCE = 0.95
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 40}

Direction = tuple[float, float]  # multiples of the sentiment vector and of the formality vector

COLUMNS: Mapping[str, Direction] = {
    "unsteered": (0.0, 0.0),
    "positive": (1.0, 0.0),
    "negative": (-1.0, 0.0),
    "positive and formal": (1.0, 1.0),
    "formal": (0.0, 1.0),
    "informal": (0.0, -1.0),
}


@dataclass(frozen=True)
class Column:
    """The outputs of all prompts under one steering, and what the grammar makes of their sentences."""

    name: str
    texts: tuple[str, ...]
    shares: Shares
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of each share


@dataclass(frozen=True)
class SweepPoint:
    """One strength of one vector, in multiples of the demonstration's own strength for it."""

    feature: Feature
    strength: float
    shares: Shares
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of each share


@dataclass(frozen=True)
class Vectors:
    """The two extracted vectors, each scaled to the demonstration's strength."""

    sentiment: SteeringVector
    formality: SteeringVector

    def spec(self, direction: Direction) -> dict[str, Any] | None:
        """The request's steering for multiples of the two vectors; None for none."""
        pairs = zip((self.sentiment, self.formality), direction, strict=True)
        steps = [{"kind": "add", "vector": vector, "scale": scale} for vector, scale in pairs if scale]
        return {"interventions": steps} if steps else None


def column_prompts() -> list[str]:
    """The prompts of every column: each neutral header, `COPIES` times."""
    return headers() * COPIES


def extract_vectors(model: SteeredModel, seed: int) -> Vectors:
    """Mean differences over contrasting prompts, at `LAYERS`."""
    found = {}
    for feature in ("sentiment", "formality"):
        with_it, without = contrasting_prompts(feature, PAIRS, seed)
        vector = extract_vector(model, with_it, without, layers=LAYERS, token="last", progress=False)
        found[feature] = STRENGTH[feature] * vector
    return Vectors(**found)


def run_columns(model: SteeredModel, vectors: Vectors, seed: int) -> tuple[dict[str, Column], int]:
    """All prompts under all columns in ONE batch, and the number of unsteered rows that equal the plain model's."""
    prompts = column_prompts()
    specs = [vectors.spec(direction) for direction in COLUMNS.values()]
    outputs = sample(model, prompts * len(specs), [spec for spec in specs for _ in prompts], seed)
    plain = plain_rows(prompts * len(specs), seed)
    equal = sum(output.token_ids == row for output, row in zip(outputs, plain[: len(prompts)], strict=False))
    columns = {}
    for index, name in enumerate(COLUMNS):
        texts = [output.text for output in outputs[index * len(prompts) : (index + 1) * len(prompts)]]
        columns[name] = Column(name, tuple(texts), measure(complete_sentences(texts)), intervals(texts))
    return columns, equal


def run_sweep(model: SteeredModel, vectors: Vectors, seed: int) -> list[SweepPoint]:
    """Every strength of either vector, again as one batch."""
    prompts = headers() * SWEEP_COPIES
    points: list[tuple[Feature, float]] = [(feature, s) for feature in ("sentiment", "formality") for s in SWEEP]
    specs = [vectors.spec((s, 0.0) if feature == "sentiment" else (0.0, s)) for feature, s in points]
    outputs = sample(model, prompts * len(points), [spec for spec in specs for _ in prompts], seed)
    found = []
    for index, (feature, strength) in enumerate(points):
        texts = [output.text for output in outputs[index * len(prompts) : (index + 1) * len(prompts)]]
        found.append(SweepPoint(feature, strength, measure(complete_sentences(texts)), intervals(texts)))
    return found


def sample(model: SteeredModel, prompts: Sequence[str], steering: Sequence[Any], seed: int) -> list[Any]:
    """One seeded batch through the steered model."""
    torch.manual_seed(seed)
    return model.generate(prompts, list(steering), **SAMPLING)


def plain_rows(prompts: Sequence[str], seed: int) -> list[list[int]]:
    """The new tokens of the same seeded batch, by a model that Transformers loads and trimtab never touches."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    plain = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(seed)
    with torch.no_grad():
        output = plain.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **SAMPLING)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def complete_sentences(texts: Sequence[str]) -> list[str]:
    """The sentences of all texts that reached their closing mark; the token limit cuts others short."""
    return [sentence for text in texts for sentence in split_sentences(text) if sentence[-1] in ".!"]


def intervals(texts: Sequence[str]) -> dict[str, Interval]:
    """An interval for each share; the sentences of one text are alike, so texts are what is counted."""
    readings = [[read_sentence(sentence) for sentence in complete_sentences([text])] for text in texts]
    answers = {
        "parsed": [[one.parsed for one in text] for text in readings],
        "positive": [[one.sentiment == "positive" for one in text if one.sentiment] for text in readings],
        "formal": [[one.formality == "formal" for one in text if one.formality] for text in readings],
    }
    return {
        name: share_interval(
            np.array([sum(text) for text in given], float), np.array([len(text) for text in given], float), CONFIDENCE
        )
        for name, given in answers.items()
    }
