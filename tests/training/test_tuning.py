"""Tuning: a vector that comes out steers at scale 1 and leaves text intact, and none comes out of noise."""

import random

import numpy as np
import pytest
import torch

from trimtab.demo import model_path
from trimtab.demo.experiment import complete_sentences
from trimtab.demo.grammar import headers, measure, sample_review
from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.training import tune_vector
from trimtab.training.trials import Trials
from trimtab.vectors.dose import dose_of, dose_warning

TOPICS = ("film", "hotel", "phone", "book", "concert", "museum", "bicycle", "restaurant")
ENDINGS = (
    ("I loved it. What a winner!", "I hated it. What a letdown!"),
    ("It was excellent.", "It was terrible."),
    ("We adored it.", "We disliked it."),
)
PRAISE = [f"Review of the {topic}: {good}" for topic in TOPICS for good, _ in ENDINGS]
SCORN = [f"Review of the {topic}: {bad}" for topic in TOPICS for _, bad in ENDINGS]


@pytest.fixture(scope="module")
def model():
    with SteeredModel.from_pretrained(model_path()) as opened:
        yield opened


@pytest.fixture(scope="module")
def tuned(model):
    return tune_vector(model, PRAISE, SCORN, doses=(0.15, 0.4, 0.6, 1.3))


def shares(model, spec):
    torch.manual_seed(5)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 40}
    return measure(complete_sentences([out.text for out in model.generate(headers() * 2, spec, **options)]))


def test_scale_one_steers_and_leaves_text_intact(model, tuned):
    assert tuned.problem == ""
    plain = shares(model, None)
    steered = shares(model, {"interventions": [{"kind": "add", "vector": tuned.vector}]})
    assert steered.positive > plain.positive + 0.25
    assert steered.parsed > 0.85
    assert len(tuned.vector.sites) == 1


def test_beyond_the_stated_limit_text_breaks_and_a_warning_says_so(model, tuned):
    limit = float(tuned.vector.metadata.extra["dose_limit"])
    broken = 2.5 * limit / dose_of(tuned.vector)
    assert dose_warning(tuned.vector) is None
    assert f"text was found intact up to {limit:.2g}" in dose_warning(tuned.vector, broken)
    assert dose_warning(broken * tuned.vector) is not None  # the warning knows the numbers, not the scale
    assert shares(model, {"interventions": [{"kind": "add", "vector": tuned.vector, "scale": broken}]}).parsed < 0.6


def test_the_metadata_hold_the_streams_median_norm(model, tuned):
    (site,) = tuned.vector.sites
    rows = [one[site][1:] for one in model.activations([*PRAISE, *SCORN], [site])]
    median = np.median(np.linalg.norm(np.concatenate(rows).astype(np.float64), axis=1))
    told = tuned.vector.metadata.extra
    assert float(told[f"stream_norm.{site.hook}.{site.layer}"]) == pytest.approx(median, rel=1e-4)
    assert float(told["dose"]) == pytest.approx(tuned.vector.norms()[site] / median, rel=1e-3)


def test_sets_that_nothing_tells_apart_give_no_vector(model):
    rng = random.Random(3)
    one, two = ([sample_review(rng, sentences=1).text for _ in range(24)] for _ in range(2))
    found = tune_vector(model, one, two, doses=(0.4,))
    assert "no layer's vector tells held-out prompts apart" in found.problem
    assert not found.usable
    assert (found.trials, found.confirmed) == ((), None)


def test_an_untrained_model_gets_no_advice(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(model.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    with SteeredModel(LlamaForCausalLM(config).eval(), model.tokenizer) as untrained:
        found = tune_vector(untrained, PRAISE, SCORN, doses=(0.15, 0.4, 1.3))
    assert not found.usable
    assert "dose_limit" not in found.vector.metadata.extra


def test_given_layers_are_kept_together(model):
    found = tune_vector(model, PRAISE, SCORN, layers=[1, 2], doses=(0.15, 0.4, 1.3), hook_point="post_block")
    assert found.usable
    assert found.vector.sites == (Site(1, HookPoint.POST_BLOCK), Site(2, HookPoint.POST_BLOCK))


def test_gains_are_those_of_a_plain_hook(model, tuned):
    """Steering a prompt under teacher forcing, against Transformers with a hook of our own."""
    from transformers import AutoModelForCausalLM

    (site,) = tuned.vector.sites
    row = torch.from_numpy(tuned.vector.directions[site].copy())
    prompts = [PRAISE[0], SCORN[1]]
    trying = Trials(model, prompts, np.array([True, False]), [[1, 5]], 2, 2)
    (trial,) = trying.run(tuned.vector, [0.7], seed=0)
    plain = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    means = []
    for add in (0.0, 0.7):
        hook = plain.model.layers[site.layer].register_forward_hook(
            lambda _m, _i, out, add=add: (out[0] + add * row, *out[1:]) if isinstance(out, tuple) else out + add * row
        )
        for prompt in prompts:
            ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = plain(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            means.append(float(logits.gather(-1, ids[0, 1:, None]).mean()))
        hook.remove()
    np.testing.assert_allclose(trial.gains, [means[2] - means[0], means[3] - means[1]], atol=1e-4)
    assert trial.effect == pytest.approx(trial.gains[0] - trial.gains[1])


def test_trials_leave_random_state_alone(model, tuned):
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    Trials(model, PRAISE[:2], np.array([True, False]), [[1, 5]], 2, 2).run(tuned.vector, [0.5], seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (PRAISE[:19], SCORN, "positive: has 19 different prompts; want 20 or more"),
        (PRAISE, [*SCORN, PRAISE[2]], "negative: 1 of its texts are positive as well"),
        (PRAISE, PRAISE, "negative: 24 of its texts are positive as well"),
        ([], SCORN, "positive: want a list"),
    ],
)
def test_sets_that_cannot_be_tried_are_refused(model, positive, negative, message):
    with pytest.raises(SteeringError, match=message):
        tune_vector(model, positive, negative)
