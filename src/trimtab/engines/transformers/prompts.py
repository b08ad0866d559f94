"""Prompts of different lengths as one padded batch that knows where its padding is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from trimtab.errors import SteeringError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, its token ids, or the messages of a chat."""


@dataclass(frozen=True)
class Encoded:
    """The token ids of one prompt, and the messages that they were rendered from, where it was given as a chat."""

    ids: list[int]
    messages: Sequence[Mapping[str, Any]] | None = None


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


def encode(prompts: Any, tokenizer: Any, vocabulary: int) -> list[Encoded]:
    """Each prompt as token ids: strings go through the tokenizer as it is configured, ids are taken as given.

    `prompts` is one prompt, a list of them, or what a tokenizer returns for either (padding that its mask shows is left
    out). Messages, dictionaries with a `role`, are rendered by the tokenizer's chat template, up to where the answer
    begins. A text that a template has rendered starts with the token that begins texts, and does not get it twice.
    Raises SteeringError, naming the prompt, for an empty one, an id outside the vocabulary, and for a string or
    messages without a tokenizer or a template.
    """
    listed = _listed(prompts)
    encoded = []
    for index, prompt in enumerate(listed):
        field = f"prompts[{index}]"
        messages = prompt if _is_chat(prompt) else None
        if isinstance(prompt, str):
            ids = _encode_text(prompt, tokenizer, field)
        elif messages is not None:
            ids = _encode_chat(messages, tokenizer, field)
        else:
            ids = _token_ids(prompt, field, vocabulary)
        if not ids:
            raise SteeringError(field, "holds no tokens; at least one is needed to start from")
        encoded.append(Encoded(ids, messages))
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


def _listed(prompts: Any) -> list[Any]:
    """The prompts one by one, whatever form they came in."""
    if isinstance(prompts, Mapping):
        return _unpadded(prompts)
    if isinstance(prompts, (torch.Tensor, np.ndarray)):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or _is_chat(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence) or not prompts:
        raise SteeringError("prompts", "want a list of one or more prompts, each a string, token ids or messages")
    listed: list[Any] = []
    for index, prompt in enumerate(prompts):
        rows = _unpadded(prompt, f"prompts[{index}]") if isinstance(prompt, Mapping) else [prompt]
        if len(rows) != 1:
            raise SteeringError(f"prompts[{index}]", f"holds {len(rows)} prompts; give each one by itself")
        listed.extend(rows)
    return listed


def _unpadded(encoding: Mapping[str, Any], field: str = "prompts") -> list[Any]:
    """The rows of what a tokenizer returns, without their padding."""
    if "input_ids" not in encoding:
        keys = ", ".join(map(repr, list(encoding)[:5]))
        raise SteeringError(field, f"is an object with {keys}; want a message with 'role', or 'input_ids'")
    ids, mask = _rows(encoding["input_ids"]), _rows(encoding.get("attention_mask"))
    if not ids:
        raise SteeringError(f"{field}.input_ids", "want the token ids of one or more prompts")
    if mask is None:
        return ids
    if list(map(len, mask)) != list(map(len, ids)):
        raise SteeringError(f"{field}.attention_mask", "does not have the shape of input_ids")
    return [[token for token, kept in zip(*row, strict=True) if kept] for row in zip(ids, mask, strict=True)]


def _rows(values: Any) -> list[Any] | None:
    """Token ids, or their mask, as one list per prompt."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, Sequence) or not values:
        return None
    return list(values) if isinstance(values[0], Sequence) else [values]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def _encode_text(text: str, tokenizer: Any, field: str) -> list[int]:
    if tokenizer is None:
        raise SteeringError(field, "is a string, but the model has no tokenizer; give one, or token ids")
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    begin, name = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "bos_token", None)
    rendered = begin is not None and name and text.startswith(name)
    return ids[1:] if rendered and ids[:2] == [begin, begin] else ids


def _encode_chat(messages: Any, tokenizer: Any, field: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        lacks = "the model has no tokenizer" if tokenizer is None else "its tokenizer has no chat template"
        raise SteeringError(field, f"is a chat, but {lacks}; render it, or give token ids")
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates are programs of their own, and say what they refuse as they like
        raise SteeringError(field, f"the chat template refuses it: {error}"[:500]) from error
    return [int(token) for token in encoded["input_ids"]]


def _token_ids(prompt: Any, field: str, vocabulary: int) -> list[int]:
    if isinstance(prompt, (torch.Tensor, np.ndarray)):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise SteeringError(field, f"is a {type(prompt).__name__}; want a string, a list of token ids, or messages")
    if len(prompt) == 1 and isinstance(prompt[0], Sequence) and not isinstance(prompt[0], str):
        prompt = prompt[0]  # a batch of one, as return_tensors="pt" makes it
    for place, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocabulary:
            raise SteeringError(f"{field}[{place}]", f"is {token!r}; want a token id from 0 to {vocabulary - 1}")
    return [int(token) for token in prompt]
