"""One stream, rows and tokens in their places, additions that arrive: else one error at open, with the true reason."""

from typing import Any

import pytest
import torch
import transformers as hf
from test_conventions import TINY, Layer, Model
from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument import map_hook_points

XLNET = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "initializer_range": 0.2}
BERT = {**TINY, "initializer_range": 0.2}
GEMMA_3N = {
    **TINY,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0, 0.0],
    "layer_types": ["full_attention", "full_attention"],
}


class TimeMajor(Model):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids).transpose(0, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


class ReversedRows(Model):
    """Each row goes through the layers in the other's place."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids).flip(0)
        for layer in self.layers:
            x = layer(x)
        return x.flip(0)


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.mean(-2, keepdim=True).expand_as(x))


class Bidirectional(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.attention = BothWays()


class PastTheHooks(Model):
    """The second layer is given what the first computed, not what its hooks made of it."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        first, second = self.layers
        x = self.embed(input_ids)
        first(x)
        return second(first.forward(x))


class Failing(Model):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise AttributeError("no such thing")


class SeveralStreams(Model):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)[:, :, None].repeat(1, 1, 4, 1)
        for layer in self.layers:
            x = layer(x)
        return x.mean(2)


REFUSED: dict[str, tuple[Any, str]] = {
    "several streams": (lambda: SeveralStreams(Layer), r"takes \(2, 5, 4, 16\) .* 4 residual streams"),
    "Gemma 3n": (lambda: hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**GEMMA_3N)), "2 residual streams"),
    "XLNet": (lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(**XLNET)), r"\(5, 2, 32\), columns first"),
    "time first": (lambda: TimeMajor(Layer), "columns first"),
    "rows exchanged": (lambda: ReversedRows(Layer), "do not keep prompts apart"),
    "attention both ways": (lambda: Model(Bidirectional), "attends to later tokens"),
    "an encoder": (lambda: hf.BertLMHeadModel(hf.BertConfig(**BERT)), "attends to later tokens"),
    "hooks passed over": (lambda: PastTheHooks(Layer), "added after layer 0 does not arrive in layer 1"),
    "a model that fails": (lambda: Failing(Layer), "AttributeError: no such thing"),
    "weights elsewhere": (lambda: Model(Layer).to("meta"), "on no device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_steered_is_refused_with_the_true_reason(case):
    make, reason = REFUSED[case]
    torch.manual_seed(0)
    with pytest.raises(SteeringError, match=reason):
        map_hook_points(make())


def test_a_prefix_that_attends_both_ways_is_refused():
    # PaliGemma's does; from Transformers 5.24 on only where token types say that there is one.
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.PaliGemmaConfig(
        vision_config={**vision, "image_size": 8, "patch_size": 4, "projection_dim": 32},
        text_config={"model_type": "gemma2", **TINY, "head_dim": 8},
        projection_dim=32,
        hidden_size=32,
        image_token_id=63,
    )
    torch.manual_seed(0)
    model = hf.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        first, other = (model(input_ids=torch.tensor([[1, 2, last]])).logits[0, 0] for last in (3, 4))
    if torch.equal(first, other):
        assert map_hook_points(model).sites.sites
        return
    with pytest.raises(SteeringError, match="attends to later tokens"):
        map_hook_points(model)


def test_a_compiled_model_has_its_hook_points():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY))
    model.compile(backend="eager")
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(map_hook_points(model).sites.sites) == 12
