"""A tiny random Llama generating under a spec of ours, and the same model generating under somebody else's library."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import SteeredModel

Llama = LlamaForCausalLM

H, LAYERS, VOCABULARY, STEPS = 32, 3, 96, 5
PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11]]


def llama() -> Llama:
    """Random float32 weights, always the same, large enough that no token is certain and no layer idle."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=H, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Llama(config).eval()


def direction(seed: int, length: float = 1.0) -> torch.Tensor:
    """A random direction [H] whose length is not 1, and not far from `length` times the root of H."""
    return length * torch.randn(H, generator=torch.Generator().manual_seed(seed))


def at(layers: Sequence[int] | Mapping[int, torch.Tensor], vector: torch.Tensor | None = None) -> dict[str, Any]:
    """An inline vector: one direction behind each of some layers, or a direction for each."""
    each = layers if isinstance(layers, Mapping) else dict.fromkeys(layers, vector)
    return {"post_block": {str(layer): one.tolist() for layer, one in each.items()}}


@cache
def plain() -> list[torch.Tensor]:
    """The logits of the model alone."""
    return ours(None)


def ours(spec: Mapping[str, Any] | None, tokenizer: Any = None) -> list[torch.Tensor]:
    """The logits [STEPS, V] of each prompt under `spec`, generated greedily in one batch."""
    with SteeredModel(llama(), tokenizer) as steered:
        out = steered.generate(PROMPTS, spec, max_new_tokens=STEPS, do_sample=False, output_logits=True)
    return [generation.logits for generation in out]


def theirs(generate: Callable[..., Any]) -> list[torch.Tensor]:
    """The same from a `generate` that takes what Transformers' own does, one prompt at a time."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        found.append(torch.stack([step[0] for step in out.logits]))
    return found


def assert_same(spec: Mapping[str, Any], generate: Callable[..., Any], tokenizer: Any = None) -> None:
    """Both give the same logits at every step, and not those of the model alone."""
    for one, other, unsteered in zip(ours(spec, tokenizer), theirs(generate), plain(), strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=3e-5)
        assert (other - unsteered).abs().max() > 0.1
