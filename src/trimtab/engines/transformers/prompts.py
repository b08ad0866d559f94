"""Prompts of different lengths as one padded batch that knows where its padding is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from trimtab.errors import SteeringError

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class PromptBatch:
    """B prompts padded to width W. Row b holds `lengths[b]` tokens after (left padding) or before the rest."""

    input_ids: torch.Tensor  # [B, W] int64
    attention_mask: torch.Tensor  # [B, W] int64: 1 on tokens, 0 on padding
    lengths: npt.NDArray[np.int64]  # [B]

    @property
    def width(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def padding(self) -> npt.NDArray[np.int64]:
        """[B]: padding positions of each row."""
        return self.width - self.lengths


def encode(prompts: Sequence[Prompt] | str, tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Token ids of each prompt: strings go through the tokenizer as it is configured, ids are taken as given.

    Raises SteeringError, naming the prompt, for an empty one, an id outside the vocabulary, or a string without a
    tokenizer.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise SteeringError("prompts", "want a list of one or more prompts, each a string or a list of token ids")
    encoded = []
    for index, prompt in enumerate(prompts):
        field = f"prompts[{index}]"
        if isinstance(prompt, str):
            if tokenizer is None:
                raise SteeringError(field, "is a string, but the model has no tokenizer; give one, or token ids")
            ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
        else:
            ids = _token_ids(prompt, field, vocabulary)
        if not ids:
            raise SteeringError(field, "holds no tokens; at least one is needed to start from")
        encoded.append(ids)
    return encoded


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"], token: int, device: torch.device) -> PromptBatch:
    """One batch of `rows`, padded with `token` on `side`; the padding is masked."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), token, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    lengths = np.array([len(row) for row in rows], np.int64)
    return PromptBatch(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device), lengths)


def _token_ids(prompt: Any, field: str, vocabulary: int) -> list[int]:
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise SteeringError(field, f"is a {type(prompt).__name__}; want a string or a list of token ids")
    for place, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocabulary:
            raise SteeringError(f"{field}[{place}]", f"is {token!r}; want a token id from 0 to {vocabulary - 1}")
    return [int(token) for token in prompt]
