"""The bundled model: small, plain, clean, fluent in its language, and trained as the tool says."""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.demo import model_path
from trimtab.demo.grammar import headers, measure, sample_review, split_sentences


@cache
def bundled() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_path()).eval(), AutoTokenizer.from_pretrained(model_path())


def test_it_is_a_stock_llama_of_at_most_8_mib() -> None:
    model, _ = bundled()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= 8 * 2**20
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads  # grouped queries, as in the models it stands for
    assert config.hidden_size % 16 == 0
    assert config.head_dim % 8 == 0
    assert model.dtype == torch.float32


def test_its_files_name_no_machine_and_no_date() -> None:
    for file in model_path().iterdir():
        text = file.read_bytes()
        for trace in (rb"/home/", rb"/root/", rb"/tmp/", rb"/Users/", rb"\b20[2-9]\d-[01]\d-"):
            assert not re.search(trace, text), f"{trace!r} in {file.name}"


def test_the_tokenizer_returns_what_it_was_given_and_begins_with_bos() -> None:
    _, tokenizer = bundled()
    texts = [sample_review(random.Random(seed)).text for seed in range(20)] + ["naïve — 東京 \U0001f41f\n two  spaces"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_a_chat_is_the_text_of_its_messages() -> None:
    _, tokenizer = bundled()
    messages = [
        {"role": "user", "content": "Review of the film:"},
        {"role": "assistant", "content": "I loved the plot."},
    ]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer("Review of the film: I loved the plot.")["input_ids"]


def test_at_least_95_percent_of_its_sampled_sentences_parse_and_both_sentiments_occur() -> None:
    model, tokenizer = bundled()
    inputs = tokenizer(headers() * 3, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(1)
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=60)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    shares = measure([sentence for text in texts for sentence in split_sentences(text) if sentence[-1] in ".!"])
    assert shares.sentences > 150
    assert shares.parsed >= 0.95
    assert 0.35 <= shares.positive <= 0.65


def test_a_telling_header_decides_the_sentiment() -> None:
    model, tokenizer = bundled()
    for word, least, most in (("Praise for", 0.9, 1.0), ("Complaint about", 0.0, 0.1)):
        prompts = [f"{word} the {topic}:" for topic in ("film", "hotel", "phone", "museum")] * 6
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        torch.manual_seed(2)
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=40)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert least <= measure([s for text in texts for s in split_sentences(text)]).positive <= most


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_its_end_token_is_stated(name: str) -> None:
    _, tokenizer = bundled()
    stated = json.loads((Path(model_path()) / name).read_text())
    assert stated["eos_token_id"] == tokenizer.eos_token_id
