"""Training of probes, on a stand-in model whose activations hold a known direction at a known layer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.training.probes import train_probe
from trimtab.vectors import Probe

H, LAYERS, PLANTED = 12, 4, 2
POSITIVE = [f"good {n}" for n in range(80)]
NEGATIVE = [f"bad {n}" for n in range(280)]
SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS))


class StandIn:
    """Noise everywhere, columns of very different sizes; at one layer the label moves the stream along `truth`.

    The tokens of a text are alike: a share `alike` of their variance is the text's own, as it is in real text.
    """

    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="stand-in"))
    sites = ModelSites(H, LAYERS, SITES)

    def __init__(self, strength=3.0, alike=0.0, seed=0):
        rng = np.random.default_rng([3, seed])
        self.sizes = 10.0 ** rng.uniform(-2, 2, H)
        self.truth = rng.standard_normal(H)
        self.truth *= strength / np.linalg.norm(self.truth)
        self.alike, self.seed = alike, seed
        self.read = []

    def activations(self, texts, sites, *, batch_size=8):
        self.read.append((tuple(texts), tuple(sites)))
        found = []
        for text in texts:
            arrays = {}
            for site in sites:
                rng = np.random.default_rng([self.seed, site.layer, *(ord(c) for c in text)])
                own, noise = rng.standard_normal(H), rng.standard_normal((3 + len(text) % 3, H))
                rows = self.alike**0.5 * own + (1 - self.alike) ** 0.5 * noise
                if site.layer == PLANTED and text.casefold().startswith("good"):
                    rows = rows + self.truth
                arrays[site] = ((rows * self.sizes) + 5.0).astype(np.float32)
            found.append(arrays)
        return found


def scores(model, probe, texts):
    """The scores of each text's tokens."""
    arrays = model.activations(texts, [probe.site])
    return [one[probe.site].astype(float) @ probe.direction + probe.bias for one in arrays]


def test_the_layer_that_tells_the_texts_apart_is_chosen():
    report = train_probe(StandIn(), POSITIVE, NEGATIVE)
    assert report.probe.site == Site(PLANTED, HookPoint.POST_BLOCK)
    assert report.better_than_chance
    assert report.auroc.value > 0.95
    assert report.auroc.low > 0.9
    assert [result.site.layer for result in report.layers] == list(range(LAYERS))
    assert all(result.auroc < 0.75 for result in report.layers if result.site.layer != PLANTED)
    assert (report.trained_on, report.thresholds_from, report.reported_on) == ((40, 140), (20, 70), (20, 70))


def test_the_direction_is_that_of_the_optimal_classifier_in_the_streams_own_units():
    model = StandIn()
    probe = train_probe(model, [f"good {n}" for n in range(700)], [f"bad {n}" for n in range(700)], layers=[2]).probe
    whitened = probe.direction * model.sizes  # Gaussian classes of one covariance: Fisher's discriminant
    assert np.dot(whitened, model.truth) / np.linalg.norm(whitened) / np.linalg.norm(model.truth) > 0.98


def test_a_score_is_the_log_odds():
    model = StandIn(strength=1.5)
    probe = train_probe(model, [f"good {n}" for n in range(700)], [f"bad {n}" for n in range(700)], layers=[2]).probe
    good, bad = (np.concatenate(scores(model, probe, [f"{k} {n}" for n in range(400)])) for k in ("good", "bad"))
    chance = 1 / (1 + np.exp(-np.concatenate([good, bad])))
    right = np.concatenate([np.ones(len(good)), np.zeros(len(bad))])
    for low in (0.1, 0.3, 0.5, 0.7):
        members = (chance >= low) & (chance < low + 0.2)
        assert right[members].mean() == pytest.approx(chance[members].mean(), abs=0.08)


def test_the_texts_that_report_are_read_at_the_chosen_site_alone_and_in_no_other_part():
    model = StandIn()
    report = train_probe(model, POSITIVE, NEGATIVE, seed=5)
    (trained, at), *later = model.read
    assert len(at) == LAYERS
    assert {sites for _, sites in later} == {(report.probe.site,)}
    read = [text for texts, _ in [(trained, at), *later] for text in texts]
    positives_for_thresholds = report.thresholds_from[0]  # have nothing to say of false positives
    assert len(read) == len(set(read)) == len(POSITIVE) + len(NEGATIVE) - positives_for_thresholds


def test_noise_is_not_better_than_chance_and_its_promises_hold_on_fresh_texts():
    """Every number of the report against texts that it never saw, over runs on noise; binomial slack of 1 in 10^4."""
    runs, passed, covered, kept, promises = 40, 0, 0, 0, 0
    for run in range(runs):
        model = StandIn(strength=0.0, alike=0.5, seed=run)
        report = train_probe(model, POSITIVE[:40], NEGATIVE, seed=run, rates=[0.05])
        passed += report.better_than_chance
        covered += report.auroc.low <= 0.5 <= report.auroc.high
        fresh = scores(model, report.probe, [f"bad {n}" for n in range(1000, 1400)])
        for one in report.thresholds:
            exceeded = [
                (text > one.threshold).mean() if one.unit == "token" else (text > one.threshold).any() for text in fresh
            ]
            kept += np.mean(exceeded) <= one.false_positive_rate
            promises += 1
    assert promises == 2 * runs
    assert passed <= 3  # of 40 at 0.01
    assert covered >= 32  # at 0.95
    assert kept >= 0.86 * promises  # at 0.95


def test_a_weak_signal_is_found_among_noisy_layers():
    found = [train_probe(StandIn(1.5, 0.3, seed=run), POSITIVE, NEGATIVE, seed=run) for run in range(5)]
    assert all(report.better_than_chance and report.probe.site.layer == PLANTED for report in found)


def test_a_rate_that_the_texts_cannot_support_is_not_promised():
    report = train_probe(StandIn(), POSITIVE, NEGATIVE[:100], rates=[0.05, 0.2])
    lowest = 1 - 0.05 ** (1 / 25)  # 25 texts, none above the threshold
    assert [(one.unit, one.false_positive_rate) for one in report.thresholds] == [
        (unit, pytest.approx(rate)) for unit in ("token", "text") for rate in (lowest, 0.2)
    ]
    token, text = report.unpromised
    assert (token.unit, text.unit) == ("token", "text")
    assert (text.false_positive_rate, text.texts, text.texts_needed) == (0.05, 25, 59)
    assert text.lowest == pytest.approx(lowest)


def test_thresholds_rise_as_rates_fall_and_the_whole_text_asks_for_more_than_a_token():
    report = train_probe(StandIn(strength=1.0), POSITIVE, NEGATIVE, rates=[0.05, 0.1, 0.25, 1.0])
    by_unit = {unit: [one for one in report.thresholds if one.unit == unit] for unit in ("token", "text")}
    for operatings in by_unit.values():
        thresholds = [one.threshold for one in operatings]
        assert thresholds == sorted(thresholds, reverse=True)
        assert operatings[-1].false_positives_per_text.value == 1.0  # a rate of 1 lets everything through
    assert all(t.threshold <= x.threshold + 0.1 for t, x in zip(by_unit["token"], by_unit["text"], strict=True))
    assert by_unit["token"][2].false_positives_per_token.value > 0.1  # and no higher than it must be
    for one in report.thresholds:
        for rate in (one.false_positives_per_token, one.false_positives_per_text, one.true_positives_per_text):
            assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_copies_of_a_text_stay_in_one_part_and_count_once():
    texts = [f"good {n}" for n in range(30)]
    copies = [text.upper() for text in texts] + [f"  {text}!" for text in texts]
    model = StandIn()
    report = train_probe(model, texts + copies, NEGATIVE)
    assert sum((report.trained_on[0], report.thresholds_from[0], report.reported_on[0])) == 30
    assert report.repeated == 60
    parts = [{text.strip(" !").casefold() for text in read} for read, _ in model.read]
    assert not any(one & other for i, one in enumerate(parts) for other in parts[:i])
    with pytest.raises(SteeringError, match="positive: has 19 different texts; want 20 or more"):
        train_probe(StandIn(), [texts[0], *texts[:19], *copies[:19]], NEGATIVE)


def test_texts_of_one_group_stay_together_whatever_their_label():
    model = StandIn()
    pairs = [*range(60), *range(60)]
    train_probe(model, POSITIVE[:60], NEGATIVE[:60], groups=pairs, seed=3)
    parts = [{int(text.split()[1]) for text in read} for read, _ in model.read]
    trained, calm, *report = parts
    assert not trained & calm
    assert not trained & report[0]
    assert report[0] == report[1]  # both of each pair
    with pytest.raises(SteeringError, match="groups: got 3 for 120 texts"):
        train_probe(StandIn(), POSITIVE[:60], NEGATIVE[:60], groups=[1, 2, 3])


def test_training_is_repeatable_and_its_file_says_how_it_was_judged(tmp_path):
    one, two = (train_probe(StandIn(), POSITIVE, NEGATIVE, seed=1) for _ in range(2))
    assert one == two
    one.probe.save(tmp_path / "p.safetensors")
    back = Probe.load(tmp_path / "p.safetensors")
    assert back == one.probe
    assert back.metadata.base_model == "stand-in"
    told = back.metadata.extra
    assert told["better_than_chance"] == "yes"
    assert float(told["auroc"]) == pytest.approx(one.auroc.value, abs=1e-4)
    assert [p["threshold"] for p in json.loads(told["thresholds"])] == [t.threshold for t in one.thresholds]
    assert train_probe(StandIn(0.0), POSITIVE, NEGATIVE).probe.metadata.extra["better_than_chance"] == "no"


def test_a_probe_of_last_tokens_promises_for_every_token_that_a_gate_would_score():
    model = StandIn()
    report = train_probe(model, POSITIVE, NEGATIVE, token="last", rates=[0.05])
    assert report.probe.site.layer == PLANTED
    text = next(one for one in report.thresholds if one.unit == "text")
    calm = scores(model, report.probe, model.read[1][0])
    assert sum((one > text.threshold).any() for one in calm) / len(calm) <= 0.05


def test_activations_that_are_not_finite_are_refused():
    class Broken(StandIn):
        def activations(self, texts, sites, *, batch_size=8):
            found = super().activations(texts, sites, batch_size=batch_size)
            found[-1][sites[0]][0, 0] = np.nan
            return found

    with pytest.raises(SteeringError, match="activations at post_block:0 are not finite for the text 'bad"):
        train_probe(Broken(), POSITIVE, NEGATIVE)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"positive": "text"}, "positive"),
        ({"negative": NEGATIVE[:19]}, "negative"),
        ({"negative": [*NEGATIVE, POSITIVE[0]]}, "negative"),
        ({"negative": [*NEGATIVE, f" {POSITIVE[0]} "]}, "negative"),
        ({"token": "mean"}, "token"),
        ({"hook_point": "resid"}, "hook_point"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": 0.05}, "held_out"),
        ({"held_out": 0.97}, "held_out"),
        ({"confidence": 1.0}, "confidence"),
        ({"significance": 0.0}, "significance"),
        ({"rates": [2.0]}, "rates"),
        ({"rates": [0.0]}, "rates"),
        ({"layers": []}, "layers"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_field(changed, field):
    arguments = {"positive": POSITIVE, "negative": NEGATIVE} | changed
    with pytest.raises(SteeringError) as refusal:
        train_probe(StandIn(), arguments.pop("positive"), arguments.pop("negative"), **arguments)
    assert refusal.value.field == field
