"""Training of probes, on a stand-in model whose activations hold a known direction at a known layer."""

from types import SimpleNamespace

import numpy as np
import pytest

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.vectors import Probe
from trimtab.vectors.probe_training import train_probe

H, LAYERS, PLANTED = 12, 4, 2
POSITIVE = [f"good {n}" for n in range(40)]
NEGATIVE = [f"bad {n}" for n in range(60)]
SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS))


class StandIn:
    """Noise everywhere, columns of very different sizes; at one layer the label moves the stream along `truth`."""

    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="stand-in"))
    sites = ModelSites(H, LAYERS, SITES)

    def __init__(self, strength=3.0):
        rng = np.random.default_rng(3)
        self.sizes = 10.0 ** rng.uniform(-2, 2, H)
        self.truth = rng.standard_normal(H)
        self.truth *= strength / np.linalg.norm(self.truth)
        self.seen = {}

    def activations(self, texts, sites, *, batch_size):
        found = []
        for text in texts:
            rng = np.random.default_rng([ord(c) for c in text])
            arrays = {}
            for site in sites:
                rows = rng.standard_normal((3 + len(text) % 3, H))
                if site.layer == PLANTED and text.startswith("good"):
                    rows = rows + self.truth
                arrays[site] = ((rows * self.sizes) + 5.0).astype(np.float32)
            self.seen[text] = arrays
            found.append(arrays)
        return found


def scores(model, probe, texts):
    return np.concatenate([model.seen[t][probe.site].astype(float) @ probe.direction + probe.bias for t in texts])


def test_the_layer_that_tells_the_texts_apart_is_chosen():
    model = StandIn()
    report = train_probe(model, POSITIVE, NEGATIVE)
    assert report.probe.site == Site(PLANTED, HookPoint.POST_BLOCK)
    assert report.auroc > 0.95
    assert [result.site.layer for result in report.layers] == list(range(LAYERS))
    assert all(result.auroc < 0.75 for result in report.layers if result.site.layer != PLANTED)
    assert (report.trained_on, report.held_out) == (70, 30)


def test_the_direction_is_that_of_the_optimal_classifier_in_the_streams_own_units():
    model = StandIn()
    probe = train_probe(model, [f"good {n}" for n in range(400)], [f"bad {n}" for n in range(400)]).probe
    whitened = probe.direction * model.sizes  # Gaussian classes of one covariance: Fisher's discriminant
    assert np.dot(whitened, model.truth) / np.linalg.norm(whitened) / np.linalg.norm(model.truth) > 0.98


def test_a_score_is_the_log_odds():
    model = StandIn(strength=1.5)
    probe = train_probe(model, [f"good {n}" for n in range(400)], [f"bad {n}" for n in range(400)]).probe
    good, bad = (scores(model, probe, [f"{kind} {n}" for n in range(400)]) for kind in ("good", "bad"))
    chance = 1 / (1 + np.exp(-np.concatenate([good, bad])))
    right = np.concatenate([np.ones(len(good)), np.zeros(len(bad))])
    for low in (0.1, 0.3, 0.5, 0.7):
        members = (chance >= low) & (chance < low + 0.2)
        assert right[members].mean() == pytest.approx(chance[members].mean(), abs=0.08)


def test_auroc_and_thresholds_are_those_of_texts_that_were_not_trained_on():
    model = StandIn(strength=1.0)
    report = train_probe(model, POSITIVE, NEGATIVE, rates=[0.0, 0.05, 0.25, 1.0], held_out=0.5, seed=7)
    for operating in report.thresholds:
        assert operating.measured_false_positive_rate <= operating.false_positive_rate
    measured = [operating.measured_false_positive_rate for operating in report.thresholds]
    assert measured[0] == 0.0
    assert measured[2] > 0.2  # and no lower than it must be
    assert measured[3] == 1.0
    assert [o.threshold for o in report.thresholds] == sorted((o.threshold for o in report.thresholds), reverse=True)
    shuffled = train_probe(StandIn(strength=0.0), POSITIVE, NEGATIVE, held_out=0.5)
    assert abs(shuffled.auroc - 0.5) < 0.15  # a probe judged on its training texts would look far better


def test_training_is_repeatable_and_its_probe_survives_a_file(tmp_path):
    one, two = (train_probe(StandIn(), POSITIVE, NEGATIVE, seed=1) for _ in range(2))
    assert one == two
    one.probe.save(tmp_path / "p.safetensors")
    back = Probe.load(tmp_path / "p.safetensors")
    assert back == one.probe
    assert back.metadata.base_model == "stand-in"


def test_last_tokens_alone_can_be_used():
    report = train_probe(StandIn(), POSITIVE, NEGATIVE, token="last")
    assert report.probe.site.layer == PLANTED


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"positive": "text"}, "positive"),
        ({"negative": NEGATIVE[:3]}, "negative"),
        ({"negative": [*NEGATIVE, POSITIVE[0]]}, "negative"),
        ({"token": "mean"}, "token"),
        ({"hook_point": "resid"}, "hook_point"),
        ({"held_out": 1.0}, "held_out"),
        ({"rates": [2.0]}, "rates"),
        ({"layers": []}, "layers"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_field(changed, field):
    arguments = {"positive": POSITIVE, "negative": NEGATIVE} | changed
    with pytest.raises(SteeringError) as refusal:
        train_probe(StandIn(), arguments.pop("positive"), arguments.pop("negative"), **arguments)
    assert refusal.value.field == field
