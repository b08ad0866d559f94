"""What `where` says of a prompt is looked for in each prompt by itself: texts, roles, special tokens, think tags."""

from typing import Any

import pytest
from families import FAMILIES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimtab.demo import model_path
from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError

SPECIAL = ["<s>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = [" calm", " sea", " the", " is", "Is", "The", "?", ".", "Yes", " wind", " and", "Hello"]
TAGS = ("<ponder>", "</ponder>")
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT = [{"role": "user", "content": "Is the sea calm?"}]
LONG = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Is the wind and the sea calm?"},
]
VECTOR = {"post_block": {"0": [1.0] * 32}}


@pytest.fixture(scope="module")
def reader() -> Any:
    vocabulary = {word: place for place, word in enumerate(["<unk>", *SPECIAL, *TAGS, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), "isolated")
    made.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", additional_special_tokens=SPECIAL)
    found.add_tokens(list(TAGS))
    found.chat_template = TEMPLATE
    return found


def spec(where: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": VECTOR, "where": where, **more}]}


def words_of(reader: Any, prompt: Any, ranges: Any) -> str:
    """The text of the tokens of a prompt that lie in some ranges, a bar between them."""
    how = {"add_generation_prompt": True, "return_dict": True}
    ids = (
        reader.apply_chat_template(prompt, **how)["input_ids"] if isinstance(prompt, list) else reader(prompt).input_ids
    )
    return "|".join(reader.decode(ids[first:stop]) for first, stop in ranges)


@pytest.mark.parametrize(
    ("where", "short", "long"),
    [
        ({"prompt": {"text": "the sea"}}, " the sea", " the sea"),
        ({"prompt": {"role": "user"}}, "Is the sea calm?", "Hello.|Is the wind and the sea calm?"),
        ({"prompt": {"role": "user", "turns": "last"}}, "Is the sea calm?", "Is the wind and the sea calm?"),
        ({"prompt": [{"text": "calm"}, [-1, None]]}, " calm|<|assistant|>", " calm|<|assistant|>"),
        ({"prompt": "all", "tokens": [" the", " sea"]}, " the sea", " the| the sea"),
        ({"prompt": "all", "special_tokens": False}, "Is the sea calm?", "Hello.|Hello.|Is the wind and the sea calm?"),
    ],
    ids=str,
)
def test_one_spec_is_placed_in_each_chat_by_itself(reader: Any, where: Any, short: str, long: str) -> None:
    with SteeredModel(FAMILIES["llama"].model(), reader) as steered:
        for prompts, expected in (([SHORT, LONG], [short, long]), ([LONG], [long])):
            out = steered.generate(prompts, spec(where), max_new_tokens=2)
            for one, prompt, text in zip(out, prompts, expected, strict=True):
                (use,) = one.receipt.interventions
                assert words_of(reader, prompt, use.asked.where.prompt) == text
                assert use.tokens == sum(stop - first for first, stop in use.asked.where.prompt)
                assert use.asked.where.answer == ()


def test_texts_are_found_in_prompts_of_text_and_of_ids(reader: Any) -> None:
    text = "The wind and the sea"
    with SteeredModel(FAMILIES["llama"].model(), reader) as steered:
        for prompt in (text, reader(text).input_ids):
            (out,) = steered.generate([prompt], spec({"prompt": {"text": "sea"}}), max_new_tokens=2)
            assert words_of(reader, text, out.receipt.interventions[0].asked.where.prompt) == " sea"


@pytest.mark.parametrize("given", ["keyword", "ids", "spec"])
def test_think_tags_come_from_the_spec_or_from_the_model_s_keyword(reader: Any, given: str) -> None:
    answer = reader(f"{TAGS[0]}The wind.{TAGS[1]}Yes.").input_ids
    forced = {
        "max_new_tokens": len(answer) + 1,
        "prefix_allowed_tokens_fn": lambda _row, ids: [[*answer, 0][len(ids) - len(reader(text).input_ids)]],
    }
    text = "Is the sea calm?"
    tags = {"name": "thinking", "start": TAGS[0], "end": TAGS[1]}
    ids = [[one] for one in reader.convert_tokens_to_ids(list(TAGS))]
    section, keyword = {"keyword": ("thinking", TAGS), "ids": ("thinking", ids), "spec": (tags, None)}[given]
    with SteeredModel(FAMILIES["llama"].model(), reader, think_tags=keyword) as steered:
        (out,) = steered.generate([text], spec({"section": section}), **forced)
        (use,) = out.receipt.interventions
    assert use.tokens == 3
    assert use.asked.where.by_tokens


def test_a_receipt_lists_the_ranges_that_were_found() -> None:
    where = {"prompt": [[1, 3], [-1, None], [4, 99]], "answer": [[0, 2], [5, None]], "not": {"answer": [[6, 7]]}}
    with SteeredModel(FAMILIES["llama"].model()) as steered:
        long, short = steered.generate([[5] * 9, [5] * 4], spec(where), max_new_tokens=4)
    told = [one.receipt.as_json()["interventions"][0] for one in (long, short)]
    assert [use["where"] for use in told] == [
        {"prompt": [[1, 3], [4, 9]], "answer": [[0, 2], [5, 6], [7, None]]},
        {"prompt": [[1, 4]], "answer": [[0, 2], [5, 6], [7, None]]},
    ]
    assert [use["tokens"] for use in told] == [2 + 5 + 2, 3 + 2]
    assert dict(long.receipt.steered_tokens) == {"prefill": 7, "decode": 2}


@pytest.mark.parametrize(
    ("where", "prompts", "message"),
    [
        ({"prompt": {"text": "storm"}}, [SHORT, LONG], r"prompt.*prompts\[0\]"),
        ({"prompt": {"text": "wind"}}, [LONG, SHORT], r"prompt.*prompts\[1\]"),
        ({"prompt": {"role": "user"}}, ["Is the sea calm?"], r"prompt.*messages"),
        ({"prompt": [[40, None]]}, [SHORT], "prompt"),
    ],
    ids=str,
)
def test_what_a_prompt_does_not_have_is_refused_with_the_prompt_s_place(
    reader: Any, where: Any, prompts: Any, message: str
) -> None:
    with SteeredModel(FAMILIES["llama"].model(), reader) as steered:
        with pytest.raises(SteeringError, match=rf"^interventions\[0\]\.where\.{message}"):
            steered.generate(prompts, spec(where), max_new_tokens=2)
        with pytest.raises(SteeringError, match=r"^steering\[1\]\.interventions\[0\]\.where\.prompt"):
            steered.generate([SHORT, prompts[-1]], [None, spec({"prompt": {"text": "storm"}})], max_new_tokens=2)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"prompt": {"text": "sea"}}, "tokenizer"),
        ({"special_tokens": False}, "tokenizer"),
        ({"tokens": [" sea"]}, "tokenizer"),
        ({"section": "thinking"}, "tags|tokenizer"),
    ],
    ids=str,
)
def test_what_needs_a_tokenizer_is_refused_without_one(where: Any, message: str) -> None:
    with (
        SteeredModel(FAMILIES["llama"].model()) as steered,
        pytest.raises(SteeringError, match=rf"interventions\[0\]\.where\.\w+.*({message})"),
    ):
        steered.generate([[5, 6, 7]], spec(where), max_new_tokens=2)


@pytest.mark.parametrize("tags", ["ab", ("<think>",), ("<think>", ""), (1, 2), ([1], [-2]), 5], ids=repr)
def test_think_tags_that_are_none_are_refused_when_a_model_is_opened(tags: Any) -> None:
    with pytest.raises(SteeringError, match=r"^think_tags(\[[01]\](\[0\])?)?: "):
        SteeredModel(FAMILIES["llama"].model(), think_tags=tags)


def test_a_row_that_a_stop_string_ends_is_counted_up_to_its_end() -> None:
    """Its padding is the very token that both rows are steered at."""
    words = AutoTokenizer.from_pretrained(model_path())
    film, end = words.convert_tokens_to_ids(["\u0120film", "<eos>"])  # U+0120 is a space
    texts = [" the film the film the film the film", " the film the good the film the film"]
    answers = [words(text, add_special_tokens=False).input_ids for text in texts]
    prompt = words("The film").input_ids
    with SteeredModel(FAMILIES["llama"].model(vocab_size=len(words)), words) as steered:
        out = steered.generate(
            [prompt] * 2,
            spec({"answer": "all", "tokens": [" film"]}),
            max_new_tokens=8,
            stop_strings=["good"],
            eos_token_id=end,
            pad_token_id=film,
            prefix_allowed_tokens_fn=lambda row, ids: [answers[row][len(ids) - len(prompt)]],
        )
    assert [one.token_ids for one in out] == [answers[0], answers[1][:4]]
    assert [one.receipt.interventions[0].tokens for one in out] == [3, 1]  # the last token of each is never run
