"""Every hook point of every family against an edited copy of the family's own layer."""

import pytest
import torch
from families import FAMILIES, SEQUENTIAL, VOCABULARY
from oracle import Addition, Recorder, greedy

from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError

STEPS = 6
PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11], [12, 13, 14, 15]]
CASES = [(name, hook) for name, family in FAMILIES.items() for hook in family.hooks]
REFUSED = [(name, hook) for name, family in FAMILIES.items() for hook in SEQUENTIAL if hook not in family.hooks]
WHY = {
    "post_attn": "parallel",
    "mlp_out": "the layer adds up block_sparse_moe, shared_mlp",
    "attn_out": "no module returns the attention branch.* the layer (scales it, or|adds up mamba, self_attn)",
}


def vector(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(32, generator=torch.Generator().manual_seed(seed))


def assert_same(model: SteeredModel, prompts, steering, tokens, logits) -> None:
    recorder = Recorder()
    out = model.generate(prompts, steering, max_new_tokens=STEPS, do_sample=False, logits_processor=[recorder])
    for ours, theirs in zip(recorder.logits, logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert [generation.token_ids for generation in out] == tokens


@pytest.mark.parametrize(("name", "hook"), [case for case in CASES if case[1] != "attn_out"])  # see test_branches
def test_one_steered_prompt_computes_what_the_edited_layers_compute(name, hook):
    family = FAMILIES[name]
    addition = Addition(hook, (0, 2), vector(1), scale=1.5)
    tokens, logits = greedy(family, family.model(), PROMPTS[:1], [[addition]], STEPS)
    with SteeredModel(family.model()) as model:
        assert_same(model, PROMPTS[:1], {"interventions": [addition.spec()]}, tokens, logits)
        plain = Recorder()
        model.generate(PROMPTS[:1], max_new_tokens=1, logits_processor=[plain])
    assert (plain.logits[0] - logits[0]).abs().max() > 1e-2  # else a hook that does nothing would pass


@pytest.mark.parametrize(("name", "hook"), CASES)
def test_a_padded_batch_steers_each_row_by_its_own_spec_and_leaves_the_others_alone(name, hook):
    family = FAMILIES[name]
    additions = [
        [Addition(hook, (0, 1), vector(1), scale=-2.0)],
        [],
        [Addition(hook, (1,), vector(2), phase="decode")],
        [Addition(hook, (2,), vector(3), phase="prefill"), Addition("post_block", (1,), vector(4), scale=0.5)],
    ]
    steering = [{"interventions": [item.spec() for item in row]} if row else None for row in additions]
    tokens, logits = greedy(family, family.model(), PROMPTS, additions, STEPS)
    with SteeredModel(family.model()) as model:
        assert_same(model, PROMPTS, steering, tokens, logits)
        steered, plain = Recorder(), Recorder()
        out = model.generate(PROMPTS, steering, max_new_tokens=STEPS, logits_processor=[steered])
    untouched = family.model()
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = untouched.generate(input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, logits_processor=[plain])
    assert out[1].token_ids == expected[1, width:].tolist()
    # Experts multiply the tokens of all rows routed to them at once: how many there are may change the last bit.
    tolerance = 1e-5 if family.has_experts else 0.0
    for ours, theirs in zip(steered.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours[1], theirs[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("name", "hook"), REFUSED)
def test_a_hook_point_that_the_family_lacks_is_refused_by_name_with_the_reason(name, hook):
    with SteeredModel(FAMILIES[name].model()) as model:
        assert [*model.refused_hook_points] == [point for point in SEQUENTIAL if point not in FAMILIES[name].hooks]
        with pytest.raises(SteeringError, match=rf"steering\[1\].*{hook}.*{WHY[hook]}"):
            model.generate(PROMPTS[:2], [None, {"interventions": [Addition(hook, (0,), vector(1)).spec()]}])
        with pytest.raises(SteeringError, match=rf"{hook}:0: .*{WHY[hook]}"):
            model.activations(PROMPTS[:2], [(0, hook)])


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_the_values_at_the_hook_points_without_the_padding(name):
    family = FAMILIES[name]
    seen: dict[tuple[int, str], torch.Tensor] = {}

    def spy(layer, hook, value):
        seen[layer, hook] = value.clone()
        return value

    edited = family.edited(family.model(), spy)
    sites = [(layer, hook) for layer in range(3) for hook in family.hooks]
    with SteeredModel(family.model()) as model:
        found = model.activations(PROMPTS, sites, batch_size=3)
    for prompt, arrays in zip(PROMPTS, found, strict=True):
        assert all(0 <= token < VOCABULARY for token in prompt)
        with torch.no_grad():
            edited(input_ids=torch.tensor([prompt]), use_cache=False)
        for site in sites:
            assert arrays[site].shape == (len(prompt), 32)
            torch.testing.assert_close(torch.from_numpy(arrays[site]), seen[site].reshape(-1, 32), atol=1e-5, rtol=1e-5)
