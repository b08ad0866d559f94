"""A text of the answer is found however the tokenizer joins it with what stands beside it, or refused."""

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

import where_tokenizers
from test_where_model import acting, unplaced
from test_where_texts import CHATML, chat, chatml, conversation
from trimtab.errors import SteeringError
from trimtab.spec.prompt_tokens import PromptTokens, Tags
from work import calls

KINDS = ["bytes_of_gpt", "lines_of_gpt", "sentences_of_llama", "sentences_of_gemma", "metaspace"]
TEXTS = [
    *("Answer:", ".", "\n\n", "\n", "user", "Done.", "<think>", "</think>", "(", "is a", "film", " twice", "0", "数学"),
    *("system!", "tag and", "plain", "ok", "x", "<think>\n", "assistant,", ":", " ", "é", "def", "return x"),
]
BESIDE = ["", " ", "\n", "\n\n", "(", ". ", ".", ", ", ": ", ":\n", "  ", ">", "\n\t", " — ", '"', "1 ", " x", "。"]


def of_word(character: str) -> bool:
    return (character.isascii() and character.isalnum()) or character in "éï"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_found_whatever_stands_beside_it_or_refused(kind: str) -> None:
    tokenizer, rng = where_tokenizers.MAKERS[kind](), random.Random(kind)
    prompt = ids_of(tokenizer, "The film")
    accepted = refused = 0
    for text in TEXTS:
        try:
            steering = unplaced([{"where": {"after": text}}]).placed(PromptTokens(len(prompt), prompt, tokenizer))
        except SteeringError as refusal:
            refused += refusal.field == "interventions[0].where.after"
            continue
        accepted += 1
        for _ in range(60):
            before = "The" + rng.choice(BESIDE) + rng.choice(BESIDE)
            behind = rng.choice(BESIDE) + rng.choice(BESIDE) + "was"
            words = (before[-1], text[0]), (text[-1], behind[0])
            if any(of_word(one) and of_word(other) for one, other in words) or text in before + behind:
                continue
            told = conversation(tokenizer, before + text + behind)
            if told.text != before + text + behind or told.text.find(text) != told.text.rfind(text):
                continue
            acts = [bool(one) for one in acting(steering, [*prompt, *told.prompt])][len(prompt) :]
            stop = len(before + text)
            assert acts == [first >= stop for first, _ in told.characters], (text, told.text)
    assert accepted + refused == len(TEXTS)
    assert accepted >= 3, kind
    assert refused >= 3 or kind in ("bytes_of_gpt", "metaspace"), kind


def placed(tokenizer: Any, where: dict[str, Any], prompt: str, **also: Any) -> Any:
    ids = ids_of(tokenizer, prompt)
    return unplaced([{"where": where}]).placed(PromptTokens(len(ids), ids, tokenizer, **also))


@pytest.mark.parametrize(
    ("where", "field", "token"),
    [
        ({"section": {"name": "response", "start": "<think>", "end": "</think>"}}, "section.start", "'>"),
        ({"section": {"name": "thinking", "start": [1], "end": "</think>"}}, "section.end", "'>"),
        ({"after": "Answer:"}, "after", "':"),
        ({"after": [1], "until": "\n\n"}, "until", "'"),
        ({"answer": "all", "not": {"until": "Done."}}, "not.until", "'."),
        ({"section": "thinking"}, "section", "'>"),
    ],
)
def test_a_text_that_a_token_hides_is_refused_with_the_token(where: dict[str, Any], field: str, token: str) -> None:
    tokenizer = where_tokenizers.MAKERS["lines_of_gpt"]()
    with pytest.raises(SteeringError) as refusal:
        placed(tokenizer, where, "The film", tags=Tags(("<think>",), ("</think>",)))
    assert refusal.value.field == f"interventions[0].where.{field}"
    assert re.search(re.escape(token) + ".*' is one token, .*; give ids of tokens instead", refusal.value.message)


def test_added_tokens_are_never_joined_and_never_refused() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    own = {"section": {"name": "thinking", "start": "<think>", "end": "</think>"}}
    for where in (own, {"section": "thinking"}, {"after": "<|im_start|>", "until": "<think>"}):
        placed(tokenizer, where, "The film")


class Counting:
    """A tokenizer of many tokens that tells how often it was asked for them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.all_special_ids: list[int] = []
        self.ids = {name: index for index, name in enumerate(names)}
        self.asked = 0

    def get_vocab(self) -> dict[str, int]:
        self.asked += 1
        return self.ids

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.ids[one] for one in text]


def test_a_vocabulary_is_looked_through_once_for_a_text() -> None:
    tokenizer = Counting([*map(chr, range(128)), *(f"w{index}" for index in range(20_000))])
    prompt = PromptTokens(2, [1, 2], tokenizer)
    prompt.runs_of("<>")
    again = PromptTokens(2, [1, 2], tokenizer)
    assert calls(lambda: again.runs_of("!?")) < 10_000  # none for each token but those that hold an edge of the text
    assert calls(lambda: again.runs_of("<>")) < 40
    assert tokenizer.asked == 1


# How a prompt ends


@pytest.mark.parametrize(
    ("prompt", "thinks"),
    [
        *(("Q?\n<think>\n", True), ("Q?\n<think>", True), ("Q?", False), ("<think>\na\n</think>\n\n", False)),
        *(("</think>\n\n<think>\n", True), ("<think>", True), ("a</think>b", False)),
    ],
)
def test_tags_of_a_prompt_are_found_however_they_are_joined(prompt: str, thinks: bool) -> None:
    tokenizer = where_tokenizers.MAKERS["lines_of_gpt"]()
    ids = ids_of(tokenizer, prompt)
    found = PromptTokens(len(ids), ids, tokenizer)
    assert found.ends_within(["<think>"], ["</think>"], otherwise=False) == thinks
    assert not found.ends_within(["<none>"], ["</none>"], otherwise=False)
    assert found.ends_within(["<none>"], ["</none>"], otherwise=True)
    last, before = ids[-1], ids[-2] if len(ids) > 1 else 0
    assert found.ends_within([(last,)], [(before,)], otherwise=False)


@pytest.mark.parametrize("given", ["template", "another template", "no template"])
@pytest.mark.parametrize("name", ["thinking", "response"])
@pytest.mark.parametrize(
    ("said", "begun", "thinks"),
    [
        *(("hello", "", False), ("hello <think>", "", False), ("<think>", "", False), ("a", "<think>\n", True)),
        *(("</think>", "<think>\n", True), ("<think>", "<think>\n", True), ("<think>", "<think>\n\n</think>\n", False)),
    ],
)
def test_tags_in_what_was_said_do_not_tell_how_an_answer_begins(
    given: str, name: str, said: str, begun: str, thinks: bool
) -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    messages = [
        {"role": "user", "content": "one <think>"},
        {"role": "assistant", "content": "<think>two"},
        {"role": "user", "content": said},
    ]

    def render(some: list[dict[str, Any]]) -> str:
        if given == "no template":
            raise RuntimeError
        own = {"chat_template": CHATML + (begun if given == "template" else "other"), "add_generation_prompt": True}
        return str(tokenizer.apply_chat_template(some, tokenize=False, **own))

    prompt = chat(tokenizer, messages, chatml(messages)[0] + begun, render=render)
    steering = unplaced([{"where": {"section": name}}]).placed(prompt)
    answer = ids_of(tokenizer, "was good")
    acts = [bool(one) for one in acting(steering, [*prompt.ids, *answer])][prompt.length :]  # type: ignore[misc]
    assert set(acts) == {thinks == (name == "thinking")}


def test_a_role_is_looked_for_once_in_a_prompt() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    rendered = []

    def render(some: list[dict[str, Any]]) -> str:
        rendered.append(some)
        return chatml(some)[0]

    messages = [{"role": "user", "content": "one"}]
    prompt = chat(tokenizer, messages, chatml(messages)[0], render=render)
    unplaced([{"where": {"prompt": [{"role": "user"}] * 64}}]).placed(prompt)
    assert len(rendered) == 1
