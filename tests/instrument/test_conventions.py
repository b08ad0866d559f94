"""What a layer does with numbers decides which hook points it has; misfits are refused by name, never mis-steered."""

import pytest
import torch
import transformers as hf
from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument import Tap, map_hook_points
from trimtab.sites import HookPoint, Site

WIDTH = 16
ALL = set(HookPoint)
SUMMED = ("attn_out", "post_attn", "mlp_out")  # a layer has none of these where it does not just add up
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x.cumsum(-2))


class Layer(nn.Module):
    """A pre-norm layer to be spoiled in one way by each subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.ffn = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.ffn(self.norm_2(x))


class NormOfACopy(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.ffn(self.norm_2(x.clone()))


class ScaledBranches(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.5 * self.attention(self.norm_1(x))
        return x + 0.5 * self.ffn(self.norm_2(x))


class ScaledStream(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = 0.5 * (x + self.attention(self.norm_1(x)))
        return x + self.ffn(self.norm_2(x))


class NormedStream(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_1(x + self.attention(x))
        return self.norm_2(x + self.ffn(x))


class ResidualOfTheNorm(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x))
        normed = self.norm_2(x)
        return normed + self.ffn(normed)


class NoAttention(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.norm_2(x))


class Parallel(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(self.norm_1(x)) + self.ffn(self.norm_2(x))


class MlpFirst(Layer):
    """Parallel, too, but the MLP is called before the attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.ffn(self.norm_2(x))
        return x + self.attention(self.norm_1(x)) + made


class NormsBehind(Layer):
    """Norms behind the attention and the MLP, within their branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_behind, self.norm_last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        nn.init.normal_(self.norm_behind.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm_behind(self.attention(self.norm_1(x)))
        return x + self.norm_last(self.ffn(self.norm_2(x)))


class AroundTheDropout(Layer):
    """What the MLP is given never went through the last module of the branch: that one is not where all pass."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.attention(self.norm_1(x))
        return x + self.dropout(made) + self.ffn(self.norm_2(x + made))


class SilentAttention(Layer):
    """Attention whose output projection starts at zero, as some recipes have it: still not parallel."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.attention.proj.weight)
        nn.init.zeros_(self.attention.proj.bias)


class Config:
    num_hidden_layers = 2
    hidden_size = WIDTH


class Model(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.config = Config()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        (Layer, {}),
        (SilentAttention, {}),
        (NormsBehind, {}),
        (Parallel, {"post_attn": "parallel"}),
        (MlpFirst, {"post_attn": "parallel", "attn_out": "has reached its MLP already"}),
        (NormOfACopy, {"post_attn": "no module is given the stream"}),
        (AroundTheDropout, {"post_attn": "no module is given the stream"}),
        (ScaledBranches, {"attn_out": "scales it, or adds to it, first", "mlp_out": "scales it first"}),
        (ScaledStream, dict.fromkeys(SUMMED, "does not return its input")),
        (NormedStream, dict.fromkeys(SUMMED, "does not return its input")),
        (ResidualOfTheNorm, dict.fromkeys(SUMMED, "does not return its input")),
        (NoAttention, dict.fromkeys((*SUMMED, "mlp_in"), "one attention sub-block and an MLP")),
    ],
)
def test_a_layer_that_does_not_fit_is_refused_by_hook_point_with_the_reason(kind, refused):
    torch.manual_seed(0)
    found = map_hook_points(Model(kind))
    assert set(found.sites.hook_points) == ALL - {HookPoint(hook) for hook in refused}
    for hook, reason in refused.items():
        assert reason in found.refusals[HookPoint(hook)]
        with pytest.raises(SteeringError, match=f"{hook}:1"):
            found.tap(Site(1, HookPoint(hook)))


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        (hf.GraniteConfig(**TINY, residual_multiplier=0.4), {"attn_out", "mlp_out"}),
        (hf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                      do_layer_norm_before=False, word_embed_proj_dim=16), {*SUMMED}),
        (hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), {*SUMMED, "mlp_in"}),
        (hf.PhiConfig(**TINY), {"post_attn"}),
        (hf.StableLmConfig(**TINY), set()),
        (hf.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2), {*SUMMED}),
        (hf.Gemma4TextConfig(**TINY, head_dim=8, global_head_dim=8, num_kv_shared_layers=0, enable_moe_block=True,
                             num_experts=4, top_k_experts=2, moe_intermediate_size=16, hidden_size_per_layer_input=8,
                             vocab_size_per_layer_input=64, layer_types=["sliding_attention", "full_attention"]),
         {*SUMMED, "mlp_in"}),
        (hf.Gemma4TextConfig(**TINY, head_dim=8, global_head_dim=8, num_kv_shared_layers=0, enable_moe_block=False,
                             hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
                             layer_types=["sliding_attention", "full_attention"]), {*SUMMED}),
        (hf.Glm4Config(**TINY, head_dim=8), set()),
        (hf.DeepseekV3Config(**TINY | {"num_key_value_heads": 4}, n_routed_experts=4, n_group=1, topk_group=1,
                             num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, kv_lora_rank=8,
                             q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8), set()),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "vocab_size") else "",
)  # fmt: skip
def test_further_families_are_judged_by_their_numbers(config, refused):
    torch.manual_seed(0)
    found = map_hook_points(hf.AutoModelForCausalLM.from_config(config))
    assert {hook.value for hook in found.refusals} == refused


def test_a_model_that_changes_the_stream_between_layers_is_refused():
    class Halving(Model):
        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False
        ) -> torch.Tensor:
            return self.layers[1](0.5 * self.layers[0](self.embed(input_ids)))

    with pytest.raises(SteeringError, match="layer 1 is not given what layer 0 returns"):
        map_hook_points(Halving(Layer))


def test_a_layer_that_differs_from_its_kind_in_a_number_alone_is_caught():
    class Weighted(Layer):
        weight = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attention(self.norm_1(x))
            return x + self.weight * self.ffn(self.norm_2(x))

    model = Model(Weighted)
    model.layers[1].weight = 0.9
    with pytest.raises(SteeringError, match=r"post_attn:1: post_attn \+ mlp_out is not post_block"):
        map_hook_points(model)

    class WeightedBefore(Layer):
        weight = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.weight * self.attention(self.norm_1(x))
            return x + self.ffn(self.norm_2(x))

    class WeightedBeside(WeightedBefore):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight * self.attention(self.norm_1(x)) + self.ffn(self.norm_2(x))

    for kind, lost, told in (  # which of the branches is not what it should be is not known in the second case
        (WeightedBefore, ["attn_out"], "pre_attn + attn_out is not post_attn in this layer"),
        (WeightedBeside, ["attn_out", "mlp_out"], "pre_attn + attn_out + mlp_out is not post_block in this layer"),
    ):
        model = Model(kind)
        model.layers[1].weight = 0.9
        first, second = map_hook_points(model).conventions
        assert {hook: second.refusals[hook] for hook in first.taps.keys() - second.taps.keys()} == dict.fromkeys(
            map(HookPoint, lost), told
        )


def test_a_bias_that_one_layer_adds_beside_its_attention_costs_that_layer_the_branch_alone():
    """As the last layer of GPT-NeoX-Japanese: the module returns the bias for the layer to add."""
    torch.manual_seed(0)
    model = hf.GPTNeoXJapaneseForCausalLM(
        hf.GPTNeoXJapaneseConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                 intermediate_multiple_size=2)
    )  # fmt: skip
    torch.nn.init.normal_(model.gpt_neox_japanese.layers[1].attention.dense_bias)
    first, last = map_hook_points(model).conventions
    assert first.taps.keys() == ALL
    assert last.refusals == {HookPoint.ATTN_OUT: "pre_attn + attn_out is not post_attn in this layer"}
    assert last.taps.keys() == ALL - {HookPoint.ATTN_OUT}


def test_the_attention_branch_is_what_leaves_the_last_module_of_it():
    torch.manual_seed(0)
    found = map_hook_points(Model(NormsBehind))
    assert found.tap(Site(0, HookPoint.ATTN_OUT)) == Tap("norm_behind", "output")
    assert found.tap(Site(0, HookPoint.MLP_OUT)) == Tap("norm_last", "output")
    assert map_hook_points(Model(AroundTheDropout)).tap(Site(0, HookPoint.ATTN_OUT)) == Tap("attention", "output")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_hook_points_are_the_same_in_every_dtype(dtype):
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY)).to(dtype)
    assert set(map_hook_points(model).sites.hook_points) == ALL
    granite = hf.GraniteForCausalLM(hf.GraniteConfig(**TINY, residual_multiplier=0.4)).to(dtype)
    assert set(map_hook_points(granite).refusals) == {HookPoint.ATTN_OUT, HookPoint.MLP_OUT}
