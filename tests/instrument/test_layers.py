"""Decoder layers are found by structure, whatever a model calls them."""

import pytest
import torch
import transformers as hf
from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument import find_decoder_layers, map_hook_points

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": None,
}


class Config:
    def __init__(self, num_hidden_layers: int, hidden_size: int = 8) -> None:
        self.num_hidden_layers, self.hidden_size = num_hidden_layers, hidden_size


class Block(nn.Module):
    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8))


class Model(nn.Module):
    def __init__(self, **lists: nn.ModuleList) -> None:
        super().__init__()
        self.config = Config(num_hidden_layers=3)
        for name, value in lists.items():
            self.add_module(name, value)


def blocks(*names: str) -> nn.ModuleList:
    return nn.ModuleList(Block((names[0], names[1])) for _ in range(3))


def test_experts_as_many_as_layers_are_not_taken_for_them():
    config = hf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    found = find_decoder_layers(hf.MixtralForCausalLM(config))
    assert (found.path, len(found), found.hidden_size) == ("model.layers", 4, 32)


def test_a_vision_tower_as_deep_as_the_decoder_is_passed_over():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**TEXT), image_token_id=63
    )
    model = hf.LlavaForConditionalGeneration(config)
    found = find_decoder_layers(model)
    assert found.path == "model.language_model.layers"
    assert found.hidden_size == 32


def test_lists_of_other_things_are_passed_over_and_the_attending_one_is_taken():
    model = Model(adapters=blocks("down", "up"), h=blocks("attn", "ffn"), norms=nn.ModuleList([nn.LayerNorm(8)] * 3))
    assert find_decoder_layers(model).path == "h"


def test_a_list_whose_layers_live_elsewhere_in_part_is_still_found():
    layers = blocks("self_attn", "mlp")
    layers[0] = nn.Identity()  # what a pipeline stage keeps in place of a layer that it does not hold
    assert len(find_decoder_layers(Model(layers=layers))) == 3


def test_one_list_under_two_names_is_one():
    layers = blocks("self_attn", "mlp")
    assert len(find_decoder_layers(Model(layers=layers, first_half=layers[:3]))) == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(one=blocks("attn", "mlp"), two=blocks("attn", "mlp")), r"found 2 \('one', 'two'\)"),
        (Model(layers=blocks("attn", "mlp")[:2]), r"expected one nn.ModuleList of 3 decoder layers.*found 0 \(none\)"),
        (nn.Linear(2, 2), "Linear has no `config`"),
        (hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)), "encoder"),
    ],
    ids=["two lists", "no list", "no config", "encoder"],
)
def test_a_model_without_one_list_of_layers_is_refused(model, message):
    with pytest.raises(SteeringError, match=message):
        find_decoder_layers(model)


def test_a_multimodal_model_serves_its_text_decoder_in_full():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=63,
    )
    assert len(map_hook_points(hf.LlavaForConditionalGeneration(config)).sites.sites) == 4 * 6


class BufferLinear(nn.Module):
    """What GPTQ and AWQ make of a linear layer: integers and scales in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().max() / 127
        self.register_buffer("qweight", (linear.weight / scale).round().to(torch.int8).t().contiguous())
        self.register_buffer("scales", scale.detach().reshape(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales)


class Packed:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight


class PackedLinear(nn.Module):
    """Weights in an object that PyTorch does not know of."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = Packed(linear.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.packed.weight.t()


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()


def exchanged(kind: type[nn.Module]) -> nn.Module:
    model = tiny_llama()
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear}, dtype=torch.qint8),
        lambda: exchanged(BufferLinear),
        lambda: exchanged(PackedLinear),
    ],
    ids=["dynamic int8", "buffers", "packed objects"],
)
def test_quantised_layers_are_found_and_have_every_hook_point(make):
    assert len(map_hook_points(make()).sites.sites) == 4 * 6


def test_a_decoder_that_names_its_head_is_looked_for_in_the_whole_model():
    config = hf.ModernBertDecoderConfig(**TEXT | {"pad_token_id": 0}, initializer_range=0.2)
    torch.manual_seed(0)
    found = map_hook_points(hf.ModernBertDecoderForCausalLM(config))
    assert found.decoder.path == "model.layers"
    assert len(found.sites.sites) == 4 * 6
