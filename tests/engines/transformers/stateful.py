"""Tiny models that keep between passes what is no key-value cache, or keep it under a name of their own."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}

CONFIGS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: hf.MambaConfig(**SIZES, state_size=4),
    "falcon-mamba": lambda: hf.FalconMambaConfig(**SIZES, state_size=4),
    "mamba2": lambda: hf.Mamba2Config(**SIZES, state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "rwkv": lambda: hf.RwkvConfig(**SIZES, attention_hidden_size=32, intermediate_size=48, rescale_every=0),
    "minimax": lambda: hf.MiniMaxConfig(
        **SIZES,
        **HEADS,
        head_dim=8,
        num_local_experts=2,
        block_size=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "recurrent-gemma": lambda: hf.RecurrentGemmaConfig(
        **SIZES,
        **HEADS,
        lru_width=32,
        head_dim=8,
        attention_window_size=8,
        block_types=("recurrent", "recurrent", "attention"),
    ),
    "jamba": lambda: hf.JambaConfig(
        **SIZES,
        **HEADS,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "bamba": lambda: hf.BambaConfig(
        **SIZES,
        **HEADS,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "lfm2": lambda: hf.Lfm2Config(
        **SIZES, **HEADS, layer_types=["conv", "full_attention", "conv"], block_multiple_of=8
    ),
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **SIZES,
        **HEADS,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "xlstm": lambda: hf.xLSTMConfig(**SIZES, num_heads=4, num_blocks=3, chunk_size=16),
}


BROKEN_IN_BATCHES = ("rwkv", "xlstm")
"""Models that Transformers itself cannot run two rows of: rows mix, or the state has another shape."""

CACHE_IS_NOT_RECOMPUTATION = ("recurrent-gemma",)
"""Models whose padded rows differ between passes with a state and without one, steered or not."""


def model(name: str) -> Any:
    """A tiny model in eval mode, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
