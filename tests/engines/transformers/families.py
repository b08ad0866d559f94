"""Tiny randomly initialised models of many families, and for each an edited copy of its layer's forward pass.

The edited copies are the oracle: they say, in the family's own code, where each hook point is. They share nothing with
`trimtab.instrument`. Each calls `steer(hook, tensor)` at every hook point that the family has.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

Steer = Callable[[str, torch.Tensor], torch.Tensor]

SEQUENTIAL = ("pre_attn", "attn_out", "post_attn", "mlp_in", "mlp_out", "post_block")
PARALLEL = ("pre_attn", "attn_out", "mlp_in", "mlp_out", "post_block")
VOCABULARY = 96

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}
GPT2_SIZES = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
DROPOUTS = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)


def _llama_like(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kw)
    x = steer("post_attn", x + steer("attn_out", attended))
    branch = layer.mlp(steer("mlp_in", layer.post_attention_layernorm(x)))
    branch = branch[0] if isinstance(branch, tuple) else branch  # GPT-OSS returns its router's scores too
    return steer("post_block", x + steer("mlp_out", branch))


def _gemma(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kw)
    x = steer("post_attn", x + steer("attn_out", layer.post_attention_layernorm(attended)))
    branch = layer.mlp(steer("mlp_in", layer.pre_feedforward_layernorm(x)))
    return steer("post_block", x + steer("mlp_out", layer.post_feedforward_layernorm(branch)))


def _olmo2(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    attended, _ = layer.self_attn(hidden_states=x, **kw)
    x = steer("post_attn", x + steer("attn_out", layer.post_attention_layernorm(attended)))
    branch = layer.mlp(steer("mlp_in", x))  # the MLP reads the stream as it is
    return steer("post_block", x + steer("mlp_out", layer.post_feedforward_layernorm(branch)))


def _gpt2(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    x = steer("post_attn", x + steer("attn_out", layer.attn(layer.ln_1(x), **kw)[0]))
    return steer("post_block", x + steer("mlp_out", layer.mlp(steer("mlp_in", layer.ln_2(x)))))


def _neox(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    attended, _ = layer.attention(layer.input_layernorm(x), **kw)
    attended = steer("attn_out", attended)
    if layer.use_parallel_residual:
        branch = layer.mlp(steer("mlp_in", layer.post_attention_layernorm(x)))
        return steer("post_block", x + attended + steer("mlp_out", branch))
    x = steer("post_attn", x + attended)
    return steer("post_block", x + steer("mlp_out", layer.mlp(steer("mlp_in", layer.post_attention_layernorm(x)))))


def _opt(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    attended = layer.self_attn(hidden_states=layer.self_attn_layer_norm(x), **kw)[0]
    x = steer("post_attn", x + steer("attn_out", attended))
    inner = layer.activation_fn(layer.fc1(steer("mlp_in", layer.final_layer_norm(x))))
    return steer("post_block", x + steer("mlp_out", layer.fc2(inner)))


def _falcon(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> tuple[torch.Tensor, None]:
    x = steer("pre_attn", x)
    two_norms = hasattr(layer, "ln_attn")
    normed = layer.ln_attn(x) if two_norms else layer.input_layernorm(x)
    attended = steer("attn_out", layer.self_attention(normed, **kw)[0])
    if layer.config.new_decoder_architecture or layer.config.parallel_attn:
        branch = layer.mlp(steer("mlp_in", layer.ln_mlp(x) if two_norms else normed))
        return steer("post_block", x + attended + steer("mlp_out", branch)), None
    x = steer("post_attn", x + attended)
    branch = layer.mlp(steer("mlp_in", layer.post_attention_layernorm(x)))
    return steer("post_block", x + steer("mlp_out", branch)), None


def _cohere(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    normed = layer.input_layernorm(x)
    attended, _ = layer.self_attn(hidden_states=normed, **kw)
    attended = steer("attn_out", attended)
    return steer("post_block", x + attended + steer("mlp_out", layer.mlp(steer("mlp_in", normed))))


def _gptj(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> Any:
    x = steer("pre_attn", x)
    normed = layer.ln_1(x)
    attended = steer("attn_out", layer.attn(hidden_states=normed, **kw)[0])
    out = steer("post_block", x + attended + steer("mlp_out", layer.mlp(steer("mlp_in", normed))))
    older = "layer_past" in inspect.signature(type(layer).forward).parameters  # Transformers before 5.24
    return (out, None) if older else out


def _granite_shared(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> torch.Tensor:
    x = steer("pre_attn", x)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kw)
    x = steer("post_attn", x + attended * layer.residual_multiplier)
    normed = steer("mlp_in", layer.post_attention_layernorm(x))
    branch = layer.block_sparse_moe(normed) + layer.shared_mlp(normed)
    return steer("post_block", x + branch * layer.residual_multiplier)


def _falcon_h1(layer: Any, x: torch.Tensor, steer: Steer, kw: dict[str, Any]) -> tuple[torch.Tensor]:
    x = steer("pre_attn", x)
    normed = layer.input_layernorm(x)
    mamba_mask = kw.pop("mamba_attention_mask", None)
    mixed = layer.mamba(hidden_states=normed, cache_params=kw.get("past_key_values"), attention_mask=mamba_mask)
    attended, _ = layer.self_attn(hidden_states=normed * layer.attention_in_multiplier, **kw)
    x = steer("post_attn", x + mixed * layer.ssm_out_multiplier + attended * layer.attn_out_multiplier)
    branch = layer.feed_forward(steer("mlp_in", layer.pre_ff_layernorm(x)))
    return (steer("post_block", x + steer("mlp_out", branch)),)


def _returns_pairs(model: Any, layer: nn.Module) -> bool:
    """Whether a layer returns its hidden states with something beside: that changes between releases."""
    seen: list[bool] = []
    handle = layer.register_forward_hook(lambda _m, _args, output: seen.append(isinstance(output, tuple)))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]), use_cache=False)
    handle.remove()
    return seen[0]


class Family:
    """One family: how to make a tiny model, the hook points it has, and its edited layer."""

    def __init__(
        self,
        config: type,
        settings: dict[str, Any],
        forward: Callable[..., Any],
        hooks: tuple[str, ...] = SEQUENTIAL,
        *,
        without: tuple[str, ...] = (),
        path: str = "model.layers",
    ) -> None:
        self.config, self.forward, self.hooks, self.path = config, forward, hooks, path
        self.settings = {k: v for k, v in {**COMMON, **settings}.items() if k not in without}

    @property
    def has_experts(self) -> bool:
        return "num_experts_per_tok" in self.settings

    def model(self, **changes: Any) -> Any:
        """A tiny model in eval mode, the same at each call."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = hf.AutoModelForCausalLM.from_config(self.config(**{**self.settings, **changes}))
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():  # norms and biases of a fresh model are ones and zeros, which would hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    def edited(self, model: Any, steer: Callable[[int, str, torch.Tensor], torch.Tensor]) -> Any:
        """`model` with its layers' forward passes exchanged for the edited copy, which calls `steer`."""
        layers = model.get_submodule(self.path)
        pair = _returns_pairs(model, layers[0])
        for index, layer in enumerate(layers):
            layer.forward = types.MethodType(self._edited_forward(index, steer, pair), layer)
        return model

    def _edited_forward(self, index: int, steer: Callable[[int, str, torch.Tensor], torch.Tensor], pair: bool) -> Any:
        def forward(layer: nn.Module, *args: Any, **kw: Any) -> Any:
            names = list(inspect.signature(type(layer).forward).parameters)[1:]  # some models pass these by place
            given = {**dict(zip(names, args, strict=False)), **kw}
            given = {name: value for name, value in given.items() if not name.startswith("encoder_")}
            hidden_states = given.pop("hidden_states")
            left = self.forward(layer, hidden_states, lambda hook, value: steer(index, hook, value), given)
            left = left[0] if isinstance(left, tuple) else left
            return (left, None) if pair else left

        return forward


MOE = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
GPT_OSS = {
    **EXPERTS,
    "num_local_experts": 4,
    "head_dim": 8,
    "sliding_window": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
FALCON = {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True, "bias": True, "alibi": False}
FALCON_H1 = {
    "head_dim": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "attention_out_multiplier": 0.6,
    "ssm_out_multiplier": 0.8,
}
NO_KV = ("num_key_value_heads",)

FAMILIES: dict[str, Family] = {
    "llama": Family(hf.LlamaConfig, {}, _llama_like),
    "mistral": Family(hf.MistralConfig, {"sliding_window": 4}, _llama_like),
    "mixtral": Family(hf.MixtralConfig, {**EXPERTS, "num_local_experts": 4, "sliding_window": None}, _llama_like),
    "qwen2": Family(hf.Qwen2Config, {}, _llama_like),
    "qwen3": Family(hf.Qwen3Config, {"head_dim": 8}, _llama_like),
    "qwen3-moe": Family(hf.Qwen3MoeConfig, {**MOE, "head_dim": 8, "mlp_only_layers": [1]}, _llama_like),
    "gemma2": Family(hf.Gemma2Config, {"head_dim": 8, "sliding_window": 4}, _gemma),
    "gemma3": Family(hf.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 4}, _gemma),
    "phi3": Family(hf.Phi3Config, {"resid_pdrop": 0.1}, _llama_like),
    "olmo2": Family(hf.Olmo2Config, {}, _olmo2),
    "gpt2": Family(hf.GPT2Config, {**GPT2_SIZES, **DROPOUTS}, _gpt2, path="transformer.h", without=NO_KV),
    "gpt-neox": Family(
        hf.GPTNeoXConfig, {"use_parallel_residual": True}, _neox, PARALLEL, path="gpt_neox.layers", without=NO_KV
    ),
    "gpt-neox-sequential": Family(
        hf.GPTNeoXConfig, {"use_parallel_residual": False}, _neox, path="gpt_neox.layers", without=NO_KV
    ),
    "opt": Family(hf.OPTConfig, {"ffn_dim": 48}, _opt, path="model.decoder.layers", without=NO_KV),
    "falcon": Family(hf.FalconConfig, FALCON, _falcon, PARALLEL, path="transformer.h", without=NO_KV),
    "falcon-two-norms": Family(
        hf.FalconConfig,
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        _falcon,
        PARALLEL,
        path="transformer.h",
        without=NO_KV,
    ),
    "falcon-alibi": Family(
        hf.FalconConfig, {**FALCON, "parallel_attn": False, "alibi": True}, _falcon, path="transformer.h", without=NO_KV
    ),
    "cohere": Family(hf.CohereConfig, {}, _cohere, PARALLEL),
    "gpt-j": Family(
        hf.GPTJConfig, {**GPT2_SIZES, **DROPOUTS, "rotary_dim": 4}, _gptj, PARALLEL, path="transformer.h", without=NO_KV
    ),
    "granite-moe-shared": Family(
        hf.GraniteMoeSharedConfig,
        {**EXPERTS, "num_local_experts": 4, "shared_intermediate_size": 24, "residual_multiplier": 0.7},
        _granite_shared,
        ("pre_attn", "post_attn", "mlp_in", "post_block"),
    ),
    "falcon-h1": Family(
        hf.FalconH1Config, FALCON_H1, _falcon_h1, ("pre_attn", "post_attn", "mlp_in", "mlp_out", "post_block")
    ),
    "gpt-oss": Family(hf.GptOssConfig, GPT_OSS, _llama_like),
}
