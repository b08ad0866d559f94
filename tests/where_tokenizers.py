"""Tokenizers of the kinds that models come with, trained here on a few lines."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import trimtab

LINES = [
    "The film was good, and the food was bad. user said: assistant, you are a system!",
    "Ünïcode déjà vu — naïve café; 数学は楽しい。 これは日本語です。 😀 😃 🏳️‍🌈 done",
    "def f(x):\n    return x + 1\n\n\tindented  twice   thrice",
    "<think> is a tag and so is </think> in plain text; 1234567890 ok",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>"]


def _fast(tokenizer: Tokenizer, **also: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL])
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **also)


def bytes_of_gpt() -> Any:
    """Byte-level pieces: a character may be spread over several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return _fast(tokenizer)


def lines_of_gpt() -> Any:
    """Byte-level pieces, in which signs and the lines' ends behind them are one token, and no tags are."""
    tokenizer = Tokenizer(models.BPE())
    parts = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(parts), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    lines = [*LINES, *["<think>\nplan\n</think>\n\nDone.\n\nAnswer:\n42 (yes) <a>b"] * 8]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentences_of_llama() -> Any:
    """Pieces with U+2581 for spaces, bytes where there is no piece, and a first space that is dropped again."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = ["".join(one for one in line if one.isascii()) for line in LINES]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=first))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>") or 400)]
    )
    return _fast(tokenizer)


def sentences_of_gemma() -> Any:
    """The same without a space of its own in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = ["".join(one for one in line if one.isascii()) for line in LINES]
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=first))
    return _fast(tokenizer)


def metaspace() -> Any:
    """A unigram model whose pre-tokenizer puts a space before each part."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return _fast(tokenizer)


def word_pieces() -> Any:
    """Pieces that are joined by a decoder of another kind, which joins words by spaces that no piece holds."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]))
    return _fast(tokenizer)


def of_the_demo() -> Any:
    """The tokenizer of the bundled model."""
    return AutoTokenizer.from_pretrained(Path(trimtab.__file__).parent / "demo" / "model")


_EVERY = (bytes_of_gpt, lines_of_gpt, sentences_of_llama, sentences_of_gemma, metaspace, word_pieces, of_the_demo)
MAKERS: dict[str, Callable[[], Any]] = {maker.__name__: cache(maker) for maker in _EVERY}
