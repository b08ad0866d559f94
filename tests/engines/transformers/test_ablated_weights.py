"""Ablation at every point that writes into the stream is what orthogonalised weights do (arXiv:2406.11717).

Taken out of the stream behind the embedding, behind each attention and behind each MLP, a direction is nowhere in it.
The same follows from weights that cannot write along it: where a layer adds its writers' outputs as they are.
"""

import pytest
import torch
from families import FAMILIES
from oracle import Recorder
from slots_oracle import numbers

from trimtab.engines.transformers import SteeredModel

PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11]]
STEPS = 6
WRITERS = ("o_proj", "down_proj")
V = numbers(1, 5.0)


def orthogonalised(model, direction):
    """`model` with `direction` taken out of its embedding and of all that its layers write."""
    unit = direction.double() / direction.double().norm()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding.double() - (embedding.double() @ unit)[:, None] * unit)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in WRITERS:
                module.weight.copy_(module.weight.double() - unit[:, None] * (unit @ module.weight.double()))
                if module.bias is not None:
                    module.bias.copy_(module.bias.double() - (unit @ module.bias.double()) * unit)
    return model


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
    for one, two in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert [out.token_ids for out in steered] == [out.token_ids for out in other]
    for less_or_none in (plain, partly):  # so it takes every one of these points
        assert (ours.logits[0] - less_or_none.logits[0]).abs().max() > 1e-3
