"""Reading a layer's convention from its source."""

import importlib
from typing import Any

import pytest
from torch import nn

from trimtab.engines.vllm.worker.conventions import (
    BranchTap,
    Convention,
    attention_join,
    branch_taps,
    convention_of,
)
from trimtab.sites import HookPoint

vllm = pytest.importorskip("vllm", reason="reads the source of vLLM's own layers")

# What a person finds when reading each class: where its result holds the residual stream.
READ_BY_HAND = {
    "llama.LlamaDecoderLayer": Convention.SPLIT,
    "qwen2.Qwen2DecoderLayer": Convention.SPLIT,
    "gemma3.Gemma3DecoderLayer": Convention.SPLIT,
    "glm4.Glm4DecoderLayer": Convention.SPLIT,
    "mixtral.MixtralDecoderLayer": Convention.SPLIT,
    "commandr.CohereDecoderLayer": Convention.FIRST,
    "exaone4.Exaone4DecoderLayer": Convention.FIRST,
    "phimoe.PhiMoEDecoderLayer": Convention.FIRST,
    "minicpm.MiniCPMDecoderLayer": Convention.FIRST,
    "gemma4.Gemma4DecoderLayer": Convention.FIRST,
    "opt.OPTDecoderLayer": Convention.WHOLE,
    "falcon.FalconDecoderLayer": Convention.WHOLE,
    "gpt2.GPT2Block": Convention.WHOLE,
    "bloom.BloomBlock": Convention.WHOLE,
}

ATTENTION_THEN_MLP = {  # where the attention ends, the norm that adds it to the stream, and the ends of the MLP branch
    "llama.LlamaDecoderLayer": ("self_attn", "post_attention_layernorm", "mlp", "mlp"),
    "mixtral.MixtralDecoderLayer": (
        "self_attn", "post_attention_layernorm", "block_sparse_moe", "block_sparse_moe"
    ),
    "gemma2.Gemma2DecoderLayer": (
        "post_attention_layernorm", "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"
    ),
    "glm4.Glm4DecoderLayer": ("post_self_attn_layernorm", "post_attention_layernorm", "mlp", "post_mlp_layernorm"),
}  # fmt: skip

WITHOUT_INNER_POINTS = ["commandr.CohereDecoderLayer", "opt.OPTDecoderLayer", "falcon.FalconDecoderLayer"]


def layer_class(path: str) -> Any:
    module, name = path.split(".")
    try:
        return getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip(f"vLLM {vllm.__version__} has no {path}")


@pytest.mark.parametrize("path", READ_BY_HAND)
def test_the_stream_is_where_a_reader_finds_it(path: str) -> None:
    assert convention_of(layer_class(path)) is READ_BY_HAND[path]


@pytest.mark.parametrize("path", ATTENTION_THEN_MLP)
def test_inner_hook_points_are_at_the_ends_of_the_branches(path: str) -> None:
    attention, norm, first, last = ATTENTION_THEN_MLP[path]
    assert attention_join(layer_class(path)) == norm
    assert branch_taps(layer_class(path)) == {
        HookPoint.ATTN_OUT: BranchTap(attention, is_input=False),
        HookPoint.POST_ATTN: BranchTap(attention, is_input=False),
        HookPoint.MLP_IN: BranchTap(first, is_input=True),
        HookPoint.MLP_OUT: BranchTap(last, is_input=False),
    }


@pytest.mark.parametrize("path", WITHOUT_INNER_POINTS)
def test_a_layer_of_another_form_has_no_inner_hook_points(path: str) -> None:
    assert branch_taps(layer_class(path)) == {}


class ScaledBranch(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        hidden_states = self.attention(hidden_states)
        hidden_states, residual = self.norm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states) * 0.5
        return hidden_states, residual


class NoAttentionAdd(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        hidden_states = self.attention(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


class OverwritesResidual(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        residual = hidden_states
        return self.mlp(hidden_states) + residual, residual


@pytest.mark.parametrize("layer", [ScaledBranch, NoAttentionAdd])
def test_a_branch_that_is_not_proved_is_not_served(layer: type) -> None:
    assert branch_taps(layer) == {}


def test_a_residual_that_is_overwritten_unread_is_no_stream() -> None:
    assert convention_of(OverwritesResidual) is Convention.FIRST


def test_a_layer_without_source_gets_the_choice_that_is_always_right() -> None:
    namespace: dict[str, Any] = {}
    exec("class Made:\n    def forward(self, hidden_states, residual): return hidden_states, residual", namespace)
    assert convention_of(namespace["Made"]) is Convention.FIRST
