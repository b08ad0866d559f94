"""Draw which tokens of a chat each selector of `where` touches: a tiny model runs them all, and is looked into.

    python tools/draw_where.py docs/images/where.svg

Every strip is one row of a batch: the same chat, the same answer, another `where`. A token is coloured if the engine
changed it behind the first layer. The tokenizer and the model are made here; the answer is given, not generated.
"""

import argparse
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab import SteeredModel

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is the sea calm?"}]
ANSWER = "<think>The wind sleeps.</think>Yes, the sea is calm.<|end|>"
THINK_TAGS = ("<think>", "</think>")
SPECIAL = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHOWN: list[dict[str, Any]] = [
    {"prompt": "all"},
    {"answer": "all"},
    {"prompt": [[-1, None]], "answer": "all"},
    {"prompt": [[2, 5], [-2, None]]},
    {"answer": [[0, 4]]},
    {"prompt": {"text": "the sea"}},
    {"prompt": {"role": "user", "turns": "last"}},
    {"special_tokens": False},
    {"special_tokens": True},
    {"tokens": [" the", " sea"]},
    {"section": "thinking"},
    {"section": "response"},
    {"after": "Yes,"},
    {"until": "</think>"},
    {"prompt": "all", "not": {"prompt": {"role": "system"}}},
    {"answer": "all", "not": {"section": "thinking"}},
]

H, LARGE = 16, 100.0
FONT, LETTER, PAD, GAP = 11, 6.62, 3.0, 2.0
LEFT, STRIP, STEP, TOP = 14, 17, 44, 50
PROMPT, REPLY, NONE = "#8fc1f0", "#f7b267", "#eef1f5"
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="Menlo, Consolas, '
    'DejaVu Sans Mono, monospace">\n<rect width="100%" height="100%" fill="#ffffff"/>'
)


def tokenizer() -> Any:
    """Words with the space before them, stops, and a chat's special tokens; the think tags are none of these."""
    texts = [*(message["content"] for message in CHAT), re.sub(r"<[^>]*>", "\n", ANSWER)]
    words = sorted({word for text in texts for word in re.findall(r" ?\w+|[^\w\s]", text)})
    vocabulary = {word: place for place, word in enumerate(["<unk>", *SPECIAL, *THINK_TAGS, *words, " Yes"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), "isolated")
    made.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", additional_special_tokens=SPECIAL)
    found.add_tokens(list(THINK_TAGS))
    found.chat_template = TEMPLATE
    return found


def model(vocabulary: int) -> LlamaForCausalLM:
    """A model of two layers that has learned nothing."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=H, intermediate_size=H, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def chat_ids(reader: Any) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those of the answer."""
    prompt = reader.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(prompt), list(reader(ANSWER, add_special_tokens=False)["input_ids"])


def touched(wheres: Sequence[dict[str, Any]]) -> list[list[bool]]:
    """Of each `where`, which tokens of chat and answer an intervention with it changes."""
    reader = tokenizer()
    prompt, answer = chat_ids(reader)
    llama = model(len(reader))
    seen: list[torch.Tensor] = []
    llama.model.layers[1].register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    vector = {"post_block": {"0": [LARGE] * H}}
    specs = [{"interventions": [{"kind": "add", "vector": vector, "where": where}]} for where in wheres]
    with SteeredModel(llama, reader, think_tags=THINK_TAGS) as steered:
        seen.clear()
        steered.generate(
            [CHAT] * (len(wheres) + 1), [*specs, None], max_new_tokens=len(answer) + 1, pad_token_id=0,
            prefix_allowed_tokens_fn=lambda _row, ids: [[*answer, 0][len(ids) - len(prompt)]],
        )  # fmt: skip
    hidden = torch.cat(seen, dim=1)
    return ((hidden[:-1] - hidden[-1]).norm(dim=-1) > LARGE / 2).tolist()


def draw(wheres: Sequence[dict[str, Any]]) -> str:
    """The picture, as SVG."""
    reader = tokenizer()
    prompt, answer = chat_ids(reader)
    words = [reader.decode([token]).strip() for token in prompt + answer]
    places, x = [], float(LEFT)
    for place, word in enumerate(words):
        x += 12.0 if place == len(prompt) else 0.0
        places.append((x, LETTER * len(word) + 2 * PAD))
        x += places[-1][1] + GAP
    colours = [PROMPT] * len(prompt) + [REPLY] * len(answer)
    parts = [_legend(places[len(prompt)][0])]
    for row, (where, mine) in enumerate(zip(wheres, touched(wheres), strict=True)):
        y = TOP + row * STEP
        parts.append(f'<text x="{LEFT}" y="{y}" font-size="{FONT}" fill="#1d2b40">{escape(json.dumps(where))}</text>')
        strip = zip(words, places, colours, mine, strict=True)
        parts += [_token(word, *at, y + 6, colour if hit else NONE, hit) for word, at, colour, hit in strip]
    size = {"width": x + LEFT, "height": TOP + STEP * len(wheres) - 8}
    return "\n".join([HEAD.format(**size), *parts, "</svg>"]) + "\n"


def _legend(answer: float) -> str:
    how = f'font-size="{FONT}" fill="#6b7a90"'
    return (
        f'<text x="{LEFT}" y="22" {how}>prompt, blue where it is steered</text>\n'
        f'<text x="{answer:.1f}" y="22" {how}>answer, orange where it is steered</text>'
    )


def _token(word: str, x: float, width: float, y: float, colour: str, hit: bool) -> str:
    ink = "#14202f" if hit else "#9aa6b5"
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{STRIP}" rx="3" fill="{colour}"/>'
        f'<text x="{x + PAD:.1f}" y="{y + 12.5}" font-size="{FONT}" fill="{ink}">{escape(word)}</text>'
    )


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.parse_args().picture.write_text(draw(SHOWN))


if __name__ == "__main__":
    main()
