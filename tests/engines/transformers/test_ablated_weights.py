"""Ablation at every point that writes into the stream is what orthogonalised weights do (arXiv:2406.11717).

Taken out of the stream behind the embedding, behind each attention and behind each MLP, a direction is nowhere in it.
The same follows from weights that cannot write along it: where a layer adds its writers' outputs as they are. Taken
out of one branch, it is one kind of writer that cannot.
"""

import itertools

import pytest
import torch
from families import FAMILIES
from oracle import Recorder
from slots_oracle import numbers

from trimtab.engines.transformers import SteeredModel

PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11]]
STEPS = 6
BRANCHES = {"attn_out": "o_proj", "mlp_out": "down_proj"}
V = numbers(1, 5.0)


def orthogonalised(model, direction, writers=("o_proj", "down_proj"), embedding=True):
    """`model` with `direction` taken out of what its `writers` write in each layer, and of its embedding."""
    unit = direction.double() / direction.double().norm()
    with torch.no_grad():
        if embedding:
            rows = model.get_input_embeddings().weight
            rows.copy_(rows.double() - (rows.double() @ unit)[:, None] * unit)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in writers:
                module.weight.copy_(module.weight.double() - unit[:, None] * (unit @ module.weight.double()))
                if module.bias is not None:
                    module.bias.copy_(module.bias.double() - (unit @ module.bias.double()) * unit)
    return model


def assert_same(ours, theirs):
    for one, two in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "cohere"])
def test_one_direction_ablated_in_a_branch_equals_orthogonalised_writers_of_that_branch(name):
    family, options = FAMILIES[name], {"max_new_tokens": 2, "do_sample": False}
    ablation = {"kind": "ablate", "vector": {"attn_out": {"1": V.tolist()}}, "layers": [0, 1, 2]}
    first = []
    for hooks in (["attn_out"], ["mlp_out"], ["attn_out", "mlp_out"], ["pre_attn", "attn_out", "mlp_out"]):
        ours, theirs = Recorder(), Recorder()
        with SteeredModel(family.model()) as model:
            model.generate(
                PROMPTS, {"interventions": [{**ablation, "hooks": hooks}]}, logits_processor=[ours], **options
            )
        writers = [BRANCHES[hook] for hook in hooks if hook in BRANCHES]
        with SteeredModel(orthogonalised(family.model(), V, writers, embedding="pre_attn" in hooks)) as model:
            model.generate(PROMPTS, logits_processor=[theirs], **options)
        assert_same(ours, theirs)
        first.append(ours.logits[0])
    for one, other in itertools.combinations(first, 2):  # so each of these points counts
        assert (one - other).abs().max() > 1e-3


def test_taken_out_of_the_stream_or_of_all_that_is_added_to_it_a_direction_is_gone_alike():
    """Also where a norm with weights stands within the branches, so that no weights would do the same."""
    ablation = {"kind": "ablate", "vector": {"attn_out": {"1": V.tolist()}}, "layers": [0, 1, 2]}
    found = []
    with SteeredModel(FAMILIES["gemma2"].model()) as model:
        for hooks in (["pre_attn", "post_attn", "post_block"], ["pre_attn", "attn_out", "mlp_out"], ["pre_attn"]):
            recorder = Recorder()
            spec = {"interventions": [{**ablation, "hooks": hooks}]}
            model.generate(PROMPTS, spec, logits_processor=[recorder], max_new_tokens=2, do_sample=False)
            found.append(recorder.logits[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_one_direction_ablated_wherever_the_stream_is_written_equals_orthogonalised_weights(name):
    family = FAMILIES[name]
    ablation = {"kind": "ablate", "vector": {"post_block": {"1": V.tolist()}}, "layers": [0, 1, 2]}
    spec = {"interventions": [{**ablation, "hooks": ["pre_attn", "post_attn", "post_block"]}]}
    ours, theirs, plain, partly = Recorder(), Recorder(), Recorder(), Recorder()
    options = {"max_new_tokens": STEPS, "do_sample": False}
    with SteeredModel(family.model()) as model:
        steered = model.generate(PROMPTS, spec, logits_processor=[ours], **options)
        model.generate(PROMPTS, logits_processor=[plain], **options)
        less = {"interventions": [{**ablation, "hooks": ["post_attn", "post_block"]}]}
        model.generate(PROMPTS, less, logits_processor=[partly], **options)
        read = model.activations(PROMPTS, [(2, "post_block")])
    assert abs(read[0][2, "post_block"] @ (V / V.norm()).numpy()).max() > 1e-2  # there is something to take out
    with SteeredModel(orthogonalised(family.model(), V)) as model:
        other = model.generate(PROMPTS, logits_processor=[theirs], **options)
    assert_same(ours, theirs)
    assert [out.token_ids for out in steered] == [out.token_ids for out in other]
    for less_or_none in (plain, partly):  # so it takes every one of these points
        assert (ours.logits[0] - less_or_none.logits[0]).abs().max() > 1e-3
