"""Trying a vector: what it does to the model's taste for the two lists, and to the text that the model writes.

- *effect*, in nats a token: how much likelier steering makes the held-out positive prompts, less how much likelier it
  makes the negative ones. Nothing is sampled. 0.1 multiplies the odds of a text of 20 tokens by e squared.
- *surprise*, in nats a token: how much less likely steered text is to the plain model than what it writes itself.
  Sampling at temperature 1 writes text of the model's own surprise, so broken text stands out.
- *repetition*: how much larger the share of repeated trigrams is in it. A loop of one word surprises no model.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trimtab.engines.transformers import SteeredModel
from trimtab.instrument.hookmap import map_hook_points
from trimtab.instrument.layer_replay import evaluating
from trimtab.instrument.taps import Transform
from trimtab.vectors.dose import dose_of
from trimtab.vectors.vector import SteeringVector

MOST_SURPRISE = 0.3
MOST_REPETITION = 0.15
LEAST_EFFECT = 0.02

Floats = npt.NDArray[np.float64]
Ids = Sequence[list[int]]


@dataclass(frozen=True)
class Trial:
    """One vector at one scale."""

    vector: SteeringVector
    scale: float
    dose: float
    gains: Floats  # [held-out prompts]: nats a token that steering makes each likelier
    effect: float
    surprise: float
    repetition: float

    @property
    def intact(self) -> bool:
        """Whether the text is still the model's own kind of text."""
        return self.surprise <= MOST_SURPRISE and self.repetition <= MOST_REPETITION


@dataclass(frozen=True)
class Trials:
    """What trials need: the model, held-out prompts with their labels, and the texts whose continuations are judged."""

    model: SteeredModel
    prompts: Sequence[str]
    positive: npt.NDArray[np.bool_]
    beginnings: Ids
    tokens: int
    batch_size: int

    def run(self, vector: SteeringVector, scales: Sequence[float], seed: int) -> list[Trial]:
        """The vector at each of the scales."""
        ids = [[int(token) for token in self.model.tokenizer(prompt)["input_ids"]] for prompt in self.prompts]
        taps = map_hook_points(self.model.model)
        starts = [1] * len(ids)
        plain = self._likelihoods(ids, starts, nullcontext())
        specs: list[Any] = [{"interventions": [{"kind": "add", "vector": vector, "scale": scale}]} for scale in scales]
        unsteered, *written = _write(self.model, self.beginnings, [None, *specs], self.tokens, self.batch_size, seed)
        own_surprise, own_repetition = self._judged(unsteered)
        found = []
        for scale, texts in zip(scales, written, strict=True):
            adding = taps.installed({site: _adding(scale * row) for site, row in vector.directions.items()})
            gains = self._likelihoods(ids, starts, adding) - plain
            surprise, repetition = self._judged(texts)
            found.append(
                Trial(
                    vector,
                    scale,
                    dose_of(vector, scale) or 0.0,
                    gains,
                    float(gains[self.positive].mean() - gains[~self.positive].mean()),
                    surprise - own_surprise,
                    repetition - own_repetition,
                )
            )
        return found

    def _judged(self, texts: Ids) -> tuple[float, float]:
        """Mean surprise and repetition of continuations of the beginnings."""
        whole = [[*begin, *text] for begin, text in zip(self.beginnings, texts, strict=True)]
        likely = self._likelihoods(whole, [len(begin) for begin in self.beginnings], nullcontext())
        return -float(likely.mean()), float(np.mean([_repetition(text) for text in texts]))

    def _likelihoods(self, rows: Ids, starts: Sequence[int], steering: AbstractContextManager[Any]) -> Floats:
        """[rows]: the mean log-likelihood of each row's tokens from its start on."""
        found, network = [], self.model.model
        device = next(network.parameters()).device
        with evaluating(network), torch.no_grad(), steering:
            for first in range(0, len(rows), self.batch_size):
                part = rows[first : first + self.batch_size]
                width = max(map(len, part))
                ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in part], device=device)
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=device)
                logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
                likely = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu().numpy().astype(np.float64)
                for place, row in enumerate(part):
                    counted = likely[place, max(starts[first + place], 1) - 1 : len(row) - 1]
                    found.append(float(counted.mean()) if len(counted) else 0.0)
        return np.array(found)


def _adding(row: npt.NDArray[np.floating]) -> Transform:
    def add(value: torch.Tensor) -> torch.Tensor:
        return (value.float() + torch.as_tensor(np.array(row, np.float32), device=value.device)).to(value.dtype)

    return add


def _write(
    model: SteeredModel, rows: Ids, specs: Sequence[Any], tokens: int, batch_size: int, seed: int
) -> list[list[list[int]]]:
    """New tokens of every row under each spec. Sampling is the plain one, whatever the model's own settings say."""
    everything = [(row, spec) for spec in specs for row in rows]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": tokens}
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    found: list[list[int]] = []
    try:
        for start in range(0, len(everything), batch_size):
            part = everything[start : start + batch_size]
            outputs = model.generate([row for row, _ in part], [spec for _, spec in part], **options)
            found += [list(output.token_ids) for output in outputs]
    finally:
        torch.set_rng_state(state)
    return [found[start : start + len(rows)] for start in range(0, len(found), len(rows))]


def _repetition(tokens: Sequence[int]) -> float:
    """The share of trigrams that repeat an earlier one."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
