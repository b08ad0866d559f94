"""Extraction against the hidden states that Transformers itself returns for each prompt alone."""

import numpy as np
import pytest
import torch

from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.extraction import extract_vector
from trimtab.vectors.vector import SteeringVector

POSITIVE = ["the sea is calm", "a boat sleeps", "calm"]
NEGATIVE = ["the storm rises and the wind rises", "storm over the sea"]


def mean_state(model, tokenizer, prompts, index, choose) -> torch.Tensor:
    states = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            states.append(choose(model(input_ids=ids, output_hidden_states=True).hidden_states[index][0].double()))
    return torch.stack(states).mean(0)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize(("token", "choose"), [("last", lambda t: t[-1]), ("mean", lambda t: t.mean(0))])
def test_a_vector_is_the_difference_of_the_mean_hidden_states(llama, tokenizer, token, choose, batch_size):
    with SteeredModel(llama, tokenizer) as model:
        vector = extract_vector(
            model, POSITIVE, NEGATIVE, layers=[1, 0], token=token, batch_size=batch_size, progress=False
        )
    assert vector.sites == (Site(0, HookPoint.POST_BLOCK), Site(1, HookPoint.POST_BLOCK))
    for layer in (0, 1):
        expected = mean_state(llama, tokenizer, POSITIVE, layer + 1, choose)
        expected -= mean_state(llama, tokenizer, NEGATIVE, layer + 1, choose)
        found = vector.directions[Site(layer, HookPoint.POST_BLOCK)]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_stream_entering_a_layer_is_the_hidden_state_before_it(llama, tokenizer):
    with SteeredModel(llama, tokenizer) as model:
        vector = extract_vector(model, POSITIVE, NEGATIVE, hook_point="pre_attn", progress=False)
    assert [site.layer for site in vector.sites] == [0, 1, 2]
    expected = mean_state(llama, tokenizer, POSITIVE, 2, lambda t: t[-1])
    expected -= mean_state(llama, tokenizer, NEGATIVE, 2, lambda t: t[-1])
    np.testing.assert_allclose(vector.directions[Site(2, HookPoint.PRE_ATTN)], expected.numpy(), atol=1e-5)


def test_metadata_says_where_a_vector_comes_from_and_survives_a_file(llama, tokenizer, tmp_path):
    llama.config._name_or_path = "tiny/llama"
    with SteeredModel(llama, tokenizer) as model:
        vector = extract_vector(model, POSITIVE, NEGATIVE, token="mean", progress=True)
    vector.save(tmp_path / "calm.safetensors")
    loaded = SteeringVector.load(tmp_path / "calm.safetensors")
    assert loaded == vector
    assert loaded.metadata.base_model == "tiny/llama"
    assert loaded.metadata.method == "mean difference"
    assert loaded.metadata.source == "3 positive and 2 negative prompts"
    assert dict(loaded.metadata.extra)["token"] == "mean"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive": []}, "positive: want a list"),
        ({"negative": "storm"}, "negative: want a list"),
        ({"token": "first"}, "token: got 'first'; want 'last' or 'mean'"),
        ({"hook_point": "post_mlp"}, "hook_point: got 'post_mlp'"),
        ({"layers": [3]}, "post_block:3: layer 3 does not exist"),
        ({"layers": []}, "layers: no layer"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ],
)
def test_a_bad_request_for_a_vector_is_refused_by_name(llama, tokenizer, changes, message):
    arguments = {"positive": POSITIVE, "negative": NEGATIVE, "progress": False, **changes}
    with SteeredModel(llama, tokenizer) as model, pytest.raises(SteeringError, match=message):
        extract_vector(model, arguments.pop("positive"), arguments.pop("negative"), **arguments)
