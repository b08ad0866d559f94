"""Extraction against the hidden states that Transformers itself returns for each prompt alone."""

import numpy as np
import pytest
import torch

from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.training.extraction import extract_vector
from trimtab.vectors.dose import dose_of
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
        vector = extract_vector(model, POSITIVE, NEGATIVE, hook_point="pre_attn", token="last", progress=False)
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
        ({"negative": [*NEGATIVE, POSITIVE[0]]}, "negative: 1 of its texts are positive as well"),
        ({"negative": POSITIVE}, "negative: 3 of its texts are positive as well"),
        ({"positive": ["sea", "calm"], "negative": [" sea", "calm "]}, "negative: 2 of its texts are positive as well"),
    ],
)
def test_a_bad_request_for_a_vector_is_refused_by_name(llama, tokenizer, changes, message):
    arguments = {"positive": POSITIVE, "negative": NEGATIVE, "progress": False, **changes}
    with SteeredModel(llama, tokenizer) as model, pytest.raises(SteeringError, match=message):
        extract_vector(model, arguments.pop("positive"), arguments.pop("negative"), **arguments)


def test_lists_whose_activations_have_one_mean_are_refused(llama, tokenizer):
    message = "negative: its prompts look like the positive ones at pre_attn:0"
    with SteeredModel(llama, tokenizer) as model, pytest.raises(SteeringError, match=message):
        # Different prompts with one last token, whose embedding is all that the first layer's input holds.
        extract_vector(
            model, ["sea calm"], ["boat calm"], layers=[0], hook_point="pre_attn", token="last", progress=False
        )


def test_activations_that_are_not_finite_are_refused_by_prompt(llama, tokenizer):
    with SteeredModel(llama, tokenizer) as model:
        with torch.no_grad():
            llama.get_input_embeddings().weight[tokenizer("storm")["input_ids"][-1]] = float("nan")
        with pytest.raises(SteeringError, match="not finite for the prompt 'the storm"):
            extract_vector(model, POSITIVE, NEGATIVE, progress=False)


def test_the_norm_of_the_stream_is_kept_beside_the_vector_without_first_tokens(llama, tokenizer):
    with torch.no_grad():  # a sink: the first token's stream is a thousand times as long
        llama.get_input_embeddings().weight[tokenizer("the")["input_ids"][0]] *= 1000
    prompts = ["the sea is calm", "the boat sleeps in the sea"]
    site = Site(1, HookPoint.POST_BLOCK)
    with SteeredModel(llama, tokenizer) as model:
        vector = extract_vector(model, prompts[:1], prompts[1:], layers=[1], progress=False)
        branch = extract_vector(model, prompts[:1], prompts[1:], layers=[1], hook_point="mlp_out", progress=False)
        rows = np.concatenate([one[site][1:] for one in model.activations(prompts, [site])])
        attention = extract_vector(model, prompts[:1], prompts[1:], layers=[1], hook_point="attn_out", progress=False)
        between = [one[Site(1, HookPoint.POST_ATTN)][1:] for one in model.activations(prompts, [(1, "post_attn")])]
    median = float(np.median(np.linalg.norm(rows.astype(np.float64), axis=1)))
    assert float(vector.metadata.extra["stream_norm.post_block.1"]) == pytest.approx(median, rel=1e-4)
    assert float(branch.metadata.extra["stream_norm.mlp_out.1"]) == pytest.approx(median, rel=1e-4)  # what it joins
    joined = float(np.median(np.linalg.norm(np.concatenate(between).astype(np.float64), axis=1)))
    assert float(attention.metadata.extra["stream_norm.attn_out.1"]) == pytest.approx(joined, rel=1e-4) != median
    (norm,) = vector.norms().values()
    assert dose_of(vector, -2.0) == pytest.approx(2 * norm / median, rel=1e-4)
