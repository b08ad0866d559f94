"""The attention branch is what the stream gains behind the attention; adding to it is adding to the stream there."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from oracle import Addition, Recorder
from slots_oracle import numbers

from trimtab.engines.transformers import SteeredModel
from trimtab.sites import Site

PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11]]
WITH_BRANCH = [name for name, family in FAMILIES.items() if "attn_out" in family.hooks]


@pytest.mark.parametrize("name", WITH_BRANCH)
def test_the_attention_branch_is_all_that_the_stream_gains_there_and_adding_to_it_is_adding_to_the_stream(name):
    family = FAMILIES[name]
    behind = "post_attn" if "post_attn" in family.hooks else "post_block"
    found = []
    with SteeredModel(family.model()) as model:
        read = model.activations(PROMPTS, sorted(model.sites.sites))
        for hook in ("attn_out", behind):
            recorder, step = Recorder(), Addition(hook, (0, 2), numbers(3), scale=1.5).spec()
            model.generate(PROMPTS, {"interventions": [step]}, max_new_tokens=2, logits_processor=[recorder])
            found.append(recorder.logits[0])
    for arrays in read:
        for layer in range(3):
            at = {site.hook.value: value for site, value in arrays.items() if site.layer == layer}
            gained = at[behind] - at["pre_attn"] - (at["mlp_out"] if behind == "post_block" else 0.0)
            size = max(np.abs(value).max() for value in at.values())
            np.testing.assert_allclose(at["attn_out"], gained, rtol=0, atol=1e-6 * size)
            assert np.abs(gained).max() > 1e-2
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_sites_of_one_layer_come_in_the_order_of_the_forward_pass():
    with SteeredModel(FAMILIES["llama"].model()) as model:
        spec = {
            "interventions": [Addition(hook, (1,), numbers(4)).spec() for hook in reversed(FAMILIES["llama"].hooks)]
        }
        (out,) = model.generate(PROMPTS[:1], spec, max_new_tokens=1)
    assert out.receipt.sites == tuple(Site(1, hook) for hook in FAMILIES["llama"].hooks)
