"""A tiny Llama and a tokenizer without a padding token, made anew for each test."""

import pytest
from families import FAMILIES, VOCABULARY

WORDS = ["the", "sea", "is", "calm", "storm", "rises", "wind", "and", "sleeps", "over", "a", "boat"]


@pytest.fixture
def llama():
    return FAMILIES["llama"].model()


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<end>", *WORDS, *(f"w{n}" for n in range(VOCABULARY - len(WORDS) - 2))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
