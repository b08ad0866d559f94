"""Prompts in every form that people have them in come to the same token ids, and to one begin token."""

from typing import Any

import numpy as np
import pytest
import torch

from trimtab.demo import model_path
from trimtab.engines.transformers.prompts import encode
from trimtab.errors import SteeringError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was the film?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The bundled one, with a chat template, which begins every text with a token of its own."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    begin = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.bos_token, tokenizer.chat_template = begin, TEMPLATE
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    assert tokenizer("film")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def ids_of(prompts: Any, tokenizer: Any) -> list[list[int]]:
    return [prompt.ids for prompt in encode(prompts, tokenizer, len(tokenizer))]


def test_a_rendered_chat_begins_once(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *expected]  # what a tokenizer makes of it
    assert ids_of([text], tokenizer) == [expected]
    assert ids_of(["film"], tokenizer) == [tokenizer("film")["input_ids"]]  # plain texts begin as they did


def test_messages_and_all_that_a_template_returns_are_prompts(tokenizer: Any) -> None:
    how = {"add_generation_prompt": True, "tokenize": True}
    expected = tokenizer.apply_chat_template(CHAT, return_dict=True, **how)["input_ids"]
    assert ids_of(CHAT, tokenizer) == [expected]
    for given in (
        CHAT,
        tokenizer.apply_chat_template(CHAT, return_dict=True, **how),
        tokenizer.apply_chat_template(CHAT, return_dict=False, **how),
        tokenizer.apply_chat_template(CHAT, return_dict=True, return_tensors="pt", **how),
        tokenizer.apply_chat_template(CHAT, return_dict=False, return_tensors="pt", **how),
        tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
    ):
        assert ids_of([given, "film"], tokenizer) == [expected, tokenizer("film")["input_ids"]]
    for given in (CHAT, tokenizer.apply_chat_template(CHAT, return_dict=True, **how)):
        assert ids_of(given, tokenizer) == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_a_padded_batch_is_taken_without_its_padding(tokenizer: Any, side: str, tensors: str | None) -> None:
    texts = ["film", "the phone and the book"]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    batch = tokenizer(texts, padding=True, return_tensors=tensors)
    assert ids_of(batch, tokenizer) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("given", [[5, 6, 7], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]), np.array([5, 6, 7])])
def test_ids_come_as_lists_arrays_and_tensors(tokenizer: Any, given: Any) -> None:
    assert ids_of([given], tokenizer) == [[5, 6, 7]]
    assert ids_of(torch.tensor([[5, 6, 7], [1, 2, 3]]), tokenizer) == [[5, 6, 7], [1, 2, 3]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "prompts: want a list"),
        ({}, "prompts: is an object with"),
        ([{"content": "no role"}], r"prompts\[0\]: is an object with 'content'"),
        ([{"role": "user", "content": "a"}, "film"], r"prompts\[0\]: is an object with 'role'"),
        ([{"input_ids": [[1], [2]]}], r"prompts\[0\]: holds 2 prompts"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask: does not have the shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "holds no tokens"),
        ([[1, True]], r"prompts\[0\]\[1\]: is True"),
        ([5.0], r"prompts\[0\]: is a float"),
        ([5, 6], r"prompts\[0\]: is a int"),
        ([[[1, 2], [3, 4]]], r"prompts\[0\]\[0\]: is \[1, 2\]"),
    ],
)
def test_what_is_no_prompt_is_named(tokenizer: Any, given: Any, words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        ids_of(given, tokenizer)


def test_a_chat_needs_a_template(tokenizer: Any) -> None:
    with pytest.raises(SteeringError, match="the model has no tokenizer"):
        encode([CHAT], None, 10)
    with pytest.raises(SteeringError, match=r"prompts\[0\]: the chat template refuses it|prompts\[0\]"):
        ids_of([[{"role": "user"}]], _without_template(tokenizer))


def _without_template(tokenizer: Any) -> Any:
    import copy

    other = copy.copy(tokenizer)
    other.chat_template = None
    return other
