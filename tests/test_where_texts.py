"""Texts, roles, special tokens and tags are found in prompts as tokens, whatever tokenizer and template made them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import where_model
import where_tokenizers
from test_where_model import acting, unplaced
from trimtab.errors import SteeringError
from trimtab.spec import chat_text
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.token_text import LOST, Pieces, text_of
from where_model import Conversation
from work import calls

KINDS = sorted(where_tokenizers.MAKERS)
PARTS = [
    *("The", " film", " was", "good", "\n", "\n\n", " ", "  ", "123", ".", "x", "user", "assistant"),
    *("😀", "🏳️\u200d🌈", "é", "ï", "数学", "日本", "は"),
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
]


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def conversation(tokenizer: Any, text: str, **also: Any) -> Conversation:
    """A prompt, and the characters of its tokens: those that the tokenizer made them of, where it decodes them to the
    same text, and else what each adds to those before it."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, whole = list(made["input_ids"]), decoded(tokenizer, made["input_ids"])
    lengths = [len(decoded(tokenizer, ids[:count])) for count in range(len(ids) + 1)]
    of_each = list(made["offset_mapping"]) if whole == text else [*pairwise(lengths)]
    if lengths[1:2] == [0]:  # a space that is dropped again
        of_each[0] = 0, 0
    return Conversation(ids, [], text=whole, characters=of_each, **also)


def is_lost(tokenizer: Any, told: Conversation, text: str) -> bool:
    """Whether nothing here can tell which characters the tokens of a prompt have."""
    parts = [decoded(tokenizer, told.prompt[:count]) for count in range(len(told.prompt) + 1)]
    return not told.text or (told.text != text and any(LOST in part for part in parts))


def received(where: dict[str, Any], told: Conversation, prompt: PromptTokens) -> list[bool]:
    steering = unplaced([{"where": where}]).placed(prompt)
    return [acts == {0} for acts in acting(steering, told.tokens)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_selects_the_tokens_that_hold_any_of_it(kind: str) -> None:
    tokenizer, rng = where_tokenizers.MAKERS[kind](), random.Random(kind)
    tried = 0
    while tried < 60:
        made_of = "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 14)))
        told = conversation(tokenizer, made_of)
        if is_lost(tokenizer, told, made_of):
            continue
        tried += 1
        first = rng.randrange(len(told.text))
        text = told.text[first : first + rng.randint(1, 6)]
        place = {"text": text, "occurrence": rng.choice([0, -1, "all"])}
        where = {"prompt": rng.choice([place, [place, [0, 1]]])}
        prompt = PromptTokens(len(told.prompt), told.prompt, tokenizer)
        assert received(where, told, prompt) == where_model.selected(where, told), (where, told)


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_have_a_text_whose_tokens_stand_in_order(kind: str) -> None:
    """Also those that no text is made of, as models make them, and whatever the way in which it is found."""
    tokenizer, rng = where_tokenizers.MAKERS[kind](), random.Random(kind)
    for _ in range(60):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 12))]
        found = text_of(tokenizer, ids, Pieces())
        assert len(found.starts) == len(found.stops) == len(ids)
        assert (np.diff(found.starts) >= 0).all()
        assert (np.diff(found.stops) >= 0).all()
        assert (found.starts <= found.stops).all()
        assert (found.starts[0], found.stops.max()) == (0, len(found.text))
        if LOST not in (whole := decoded(tokenizer, ids)):
            assert found.text == whole


def test_a_prompt_is_decoded_once_and_pieces_are_remembered() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    ids = list(tokenizer("The film was good, the food was bad. " * 50)["input_ids"])
    steering = unplaced([{"where": {"prompt": {"text": "film", "occurrence": "all"}}}])
    steering.placed(PromptTokens(len(ids), ids, tokenizer))
    few = calls(lambda: steering.placed(PromptTokens(len(ids) // 10, ids[: len(ids) // 10], tokenizer)))
    many = calls(lambda: steering.placed(PromptTokens(len(ids), ids, tokenizer)))
    assert many - few < 6 * (len(ids) - len(ids) // 10)  # calls for each token, and some for each place of the text


def test_tokens_that_the_tokenizer_does_not_know_have_no_text() -> None:
    """Models have some for images and sounds."""
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    known = list(tokenizer("The film was good")["input_ids"])
    ids = [*known[:2], *[len(tokenizer) + 7] * 200, *known[2:]]
    steering = unplaced([{"where": {"prompt": {"text": "film"}}}])
    first = steering.placed(PromptTokens(len(known), known, tokenizer)).asked[0].where
    work = calls(lambda: steering.placed(PromptTokens(len(ids), ids, tokenizer)))
    found = steering.placed(PromptTokens(len(ids), ids, tokenizer)).asked[0].where
    assert first is not None
    assert found is not None
    assert found.prompt[0][1] == first.prompt[0][1] + 200
    assert work < 2000  # none is decoded by itself


def test_a_text_that_is_not_there_is_refused() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    ids = tokenizer("The film was good, the film was bad.")["input_ids"]
    prompt = PromptTokens(len(ids), ids, tokenizer)
    for place, said in (
        ({"text": "book"}, r"prompt\.text: 'book' is not in the prompt, whose \d+ tokens read 'The film"),
        ({"text": "film", "occurrence": 2}, r"prompt\.occurrence: got 2, but the prompt holds 'film' 2 times"),
        ({"text": "film", "occurrence": -3}, r"prompt\.occurrence: got -3, but the prompt holds 'film' 2 times"),
        ({"text": "good", "occurrence": 1}, r"prompt\.occurrence: got 1, but the prompt holds 'good' once"),
    ):
        with pytest.raises(SteeringError, match=r"interventions\[0\]\.where\." + said):
            unplaced([{"where": {"prompt": place}}]).placed(prompt)


def test_a_text_is_found_however_its_accents_are_written() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    told = conversation(tokenizer, "a naïve café")
    prompt = PromptTokens(len(told.prompt), told.prompt, tokenizer)
    assert received({"prompt": {"text": "nai\u0308ve"}}, told, prompt) == where_model.selected(
        {"prompt": {"text": "naïve"}}, told
    )


# Roles

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = (
    "<s>{% for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}\n\n{% endfor %}assistant:"
)


Written = tuple[str, list[tuple[str, int, int]]]
"""A chat, and who said what, from which character of it to before which."""


def chatml(messages: Sequence[dict[str, str]]) -> Written:
    return _written(
        [(f"<|im_start|>{one['role']}\n", one, one["content"], "<|im_end|>\n") for one in messages],
        "<|im_start|>assistant\n",
    )


def trimmed(messages: Sequence[dict[str, str]]) -> Written:
    parts = [(f"{one['role']}: ", one, one["content"].strip(), "\n\n") for one in messages]
    text, said = _written(parts, "assistant:")
    return "<s>" + text, [(role, first + 3, stop + 3) for role, first, stop in said]


def _written(
    parts: Sequence[tuple[str, dict[str, str], str, str]], last: str
) -> tuple[str, list[tuple[str, int, int]]]:
    text, said = "", []
    for before, message, content, behind in parts:
        text += before
        said.append((message["role"], len(text), len(text) + len(content)))
        text += content + behind
    return text + last, said


TEMPLATES = {"chatml": (CHATML, chatml), "trimmed": (TRIMMED, trimmed)}
WORDS = [
    *("user", "assistant", "a", "s", "user\n", ": ", "im_start", "<think>"),
    *("The film", " good ", "1", "naïve 😀", "\n\n"),
]


@pytest.mark.parametrize("kind", ["bytes_of_gpt", "sentences_of_gemma"])
@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_a_role_selects_what_its_messages_say_and_nothing_of_the_template(kind: str, template: str) -> None:
    tokenizer, rng = where_tokenizers.MAKERS[kind](), random.Random(kind + template)
    source, write = TEMPLATES[template]

    def render(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False))

    for _ in range(60):
        roles = ["system", "user", "assistant", "user"][rng.randint(0, 1) : rng.randint(2, 4)]
        messages = [{"role": role, "content": rng.choice(WORDS) + rng.choice(["", *WORDS])} for role in roles]
        text, said = write(messages)
        told = conversation(tokenizer, text, said=said)
        assert told.text == text
        role = rng.choice(roles)
        if not any(first < stop for own, first, stop in said if own == role):
            continue
        turns = rng.choice(["all", "last"])
        if turns == "last" and not [stop - first for own, first, stop in said if own == role][-1]:
            continue
        where = {"prompt": {"role": role, "turns": turns}}
        prompt = PromptTokens(len(told.prompt), told.prompt, tokenizer, messages, render)
        assert received(where, told, prompt) == where_model.selected(where, told), (messages, where)


def chat(tokenizer: Any, messages: Sequence[dict[str, Any]], text: str, **also: Any) -> PromptTokens:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return PromptTokens(len(ids), ids, tokenizer, messages, **also)


def selected_text(prompt: PromptTokens, where: dict[str, Any]) -> str:
    spans = unplaced([{"where": where}]).placed(prompt).asked[0].where
    assert spans is not None
    return "|".join(decoded(prompt.tokenizer, prompt.ids[first:stop]) for first, stop in spans.prompt)  # type: ignore[index]


def test_without_a_template_messages_are_found_in_their_order_or_refused() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    messages = [
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": "The film was good"},
        {"role": "user", "content": "good"},
    ]
    text, _ = chatml(messages)
    prompt = chat(tokenizer, messages, text)
    assert selected_text(prompt, {"prompt": {"role": "user"}}) == "good|good"
    assert selected_text(prompt, {"prompt": {"role": "assistant"}}) == "The film was good"
    several = [{"role": "user", "content": "s"}]
    with pytest.raises(SteeringError, match=r"prompt\.role: what messages\[0\] says, 's', stands in the prompt more"):
        selected_text(chat(tokenizer, several, chatml(several)[0]), {"prompt": {"role": "user"}})


def test_parts_of_a_message_are_found_each() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    parts = [{"type": "text", "text": "The film"}, {"type": "image_url"}, {"type": "text", "text": "was bad"}]
    prompt = chat(tokenizer, [{"role": "user", "content": parts}], "<|im_start|>user\nThe film<s><s> was bad<|im_end|>")
    assert selected_text(prompt, {"prompt": {"role": "user"}}) == "The film| was bad"


def test_a_role_that_is_not_there_is_refused() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    messages = [{"role": "user", "content": "good"}, {"role": "assistant", "content": None}]
    other = [{"role": "user", "content": "other"}]
    text = "<|im_start|>user\ngood<|im_end|>\n"
    for given, place, said in (
        (messages, {"role": "system"}, r"no message has the role 'system'; the roles of this chat are user, assis"),
        (messages, {"role": "assistant"}, r"what is said as 'assistant' is no text, or an empty one"),
        (
            other,
            {"role": "user"},
            r"what messages\[0\] says as 'user' cannot be found",
        ),
        (None, {"role": "user"}, r"needs a chat, whose messages have roles"),
    ):
        prompt = replace(chat(tokenizer, messages, text), messages=given)
        with pytest.raises(SteeringError, match=r"interventions\[0\]\.where\.prompt\.role: " + said):
            unplaced([{"where": {"prompt": place}}]).placed(prompt)


def test_a_template_that_fails_is_as_good_as_none() -> None:
    def broken(messages: list[dict[str, Any]]) -> str:
        raise RuntimeError("no such chat")

    said = chat_text.spoken("a good film", [{"role": "user", "content": "good"}], "user", last=False, render=broken)
    assert said == [(2, 6)]


# What the answer's tokens are


def test_special_tokens_are_those_of_the_tokenizer_and_no_tags() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    told = conversation(tokenizer, "<|im_start|>The <think>film</think><|im_end|>")
    told.special = frozenset(tokenizer.convert_tokens_to_ids(where_tokenizers.SPECIAL))
    told.answer = told.prompt
    prompt = PromptTokens(len(told.prompt), told.prompt, tokenizer)
    for where in ({"special_tokens": False}, {"special_tokens": True}, {"answer": "all", "special_tokens": False}):
        assert received(where, told, prompt) == where_model.selected(where, told)


@pytest.mark.parametrize("start", ["", "<think>", "<think>a</think>", "<think>a</think><think>"])
def test_thinking_is_what_lies_between_the_tags_that_the_vocabulary_has(start: str) -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    told = conversation(tokenizer, "The film" + start)
    told.answer = tokenizer("was<think>good</think>food\n</think>was")["input_ids"]
    told.starts, told.ends = (
        [[tokenizer.convert_tokens_to_ids(tag)] for tag in where_tokenizers.TAGS][at:][:1] for at in (0, 1)
    )
    prompt = PromptTokens(len(told.prompt), told.prompt, tokenizer)
    for name in ("thinking", "response"):
        for section in (name, {"name": name, "start": "<think>", "end": "</think>"}):
            where = {"section": section}
            assert received(where, told, prompt) == where_model.selected({"section": name}, told)


@pytest.mark.parametrize("kind", ["bytes_of_gpt", "sentences_of_llama", "metaspace"])
def test_a_text_of_the_answer_is_known_alone_and_behind_other_text(kind: str) -> None:
    """Its tokens differ there, for many tokenizers."""
    tokenizer = where_tokenizers.MAKERS[kind]()
    ids = tokenizer("The film", add_special_tokens=False)["input_ids"]
    steering = unplaced([{"where": {"after": "user"}}]).placed(PromptTokens(len(ids), ids, tokenizer))
    for text in ("user, bad", "was user, bad", "was\nuser, bad"):
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        acts = [bool(one) for one in acting(steering, [*ids, *answer])][len(ids) :]
        behind = len(text) - len(", bad")
        assert acts == [first >= behind for first, _ in conversation(tokenizer, text).characters], text


CALLED = {300: "[THINK]", 301: "[/THINK]"}


class ByteTokens:
    """A tokenizer that has a byte for each token, reads special tokens as text, and cannot clean up."""

    all_special_ids = (300, 301)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        raw = b"".join(CALLED[one].encode() if one in CALLED else bytes([one]) for one in ids)
        return raw.decode("utf-8", "replace")

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | bytes]:
        return [CALLED.get(one, bytes([one % 256])) for one in ids]

    def convert_tokens_to_ids(self, text: str) -> int:
        return next((token for token, name in CALLED.items() if name == text), 0)


def test_a_tokenizer_that_reads_special_tokens_as_text_still_has_them() -> None:
    tokenizer = ByteTokens()
    ids = [*tokenizer.encode("é [THINK] "), 300, *tokenizer.encode("é")]
    prompt = PromptTokens(len(ids), ids, tokenizer)
    assert unplaced([{"where": {"prompt": {"text": "é", "occurrence": -1}}}]).placed(prompt).asked[0].where == (
        ((len(ids) - 2, len(ids)),),
        (),
        False,
    )
    thinking = unplaced([{"where": {"section": "thinking"}}]).placed(prompt)
    assert acting(thinking, [*ids, 65, 301, 65])[len(ids) :] == [{0}, set(), set()]


def test_texts_that_are_not_one_token_are_refused() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    ids = tokenizer("The film")["input_ids"]
    prompt = PromptTokens(len(ids), ids, tokenizer, vocabulary_size=400)
    for where, said in (
        ({"tokens": [3, "The film"]}, r"tokens\[1\]: 'The film' is \d tokens, \[.*\], and not one"),
        ({"tokens": [3, 400]}, r"tokens\[1\]: got the id 400, and this model has 400 tokens: 0 to 399"),
        ({"after": [3, 400]}, r"after\[1\]: got the id 400, and this model has 400 tokens"),
        ({"until": "z" * 40}, r"until: 'z+' is \d+ tokens, want 1 to 16"),
    ):
        with pytest.raises(SteeringError, match=r"interventions\[0\]\.where\." + said):
            unplaced([{"where": where}]).placed(prompt)


NO_TOKENIZER = r"needs a tokenizer, which this engine was not given"
EMBEDDED = r"needs tokens, and this prompt is made of embeddings"


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"after": "x"}, "after"),
        ({"until": "x"}, "until"),
        ({"tokens": ["x"]}, "tokens[0]"),
        ({"special_tokens": False}, "special_tokens"),
        ({"section": {"name": "thinking", "start": "x", "end": "y"}}, "section.start"),
        ({"not": {"prompt": [[0, 1], {"text": "x"}]}}, "not.prompt[1]"),
    ],
)
def test_what_needs_a_tokenizer_is_refused_without_one(where: dict[str, Any], field: str) -> None:
    for prompt, said in ((PromptTokens(3, [1, 2, 3]), NO_TOKENIZER), (PromptTokens(3), EMBEDDED)):
        with pytest.raises(SteeringError) as refusal:
            unplaced([{"where": where}]).placed(prompt)
        assert refusal.value.field == f"interventions[0].where.{field}"
        assert said in refusal.value.message


@pytest.mark.parametrize("where", [{"after": [1]}, {"tokens": [1]}, {"section": "thinking"}])
def test_what_needs_tokens_is_refused_for_embeddings(where: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=EMBEDDED):
        unplaced([{"where": where}]).placed(PromptTokens(3))
    ranges = unplaced([{"where": {"prompt": [[-1, None]], "answer": "all"}}]).placed(PromptTokens(3))
    assert ranges.asked[0].where == (((2, 3),), ((0, None),), False)
