"""Probes from labelled texts: logistic regression on activations, with the layer, the thresholds and the report each
from texts of their own.

A linear probe in the sense of Alain and Bengio, "Understanding intermediate layers using linear classifier probes"
(arXiv:1610.01644). Every token of a training text carries its text's label, since a gate scores every token; in
`last` mode only the last one does.

The texts are split into three parts that have none in common. The first trains: the layer is chosen by threefold
cross-validation within it. The second sets thresholds. The third is read last, and only to report. Whatever was chosen
was therefore chosen without the texts that judge it.

The scores of the probe are log-odds: `x . direction + bias` is 0 where both labels are equally likely, so a gate with
`threshold` 0 and `sharpness` 1 opens with the probability that the classifier gives.
"""

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.training.parts import LabelledTexts
from trimtab.training.probe_report import LayerResult, Operating, ProbeReport, Unit, Unpromised
from trimtab.training.statistics import (
    Floats,
    auroc,
    auroc_interval,
    lowest_promise,
    mean_interval,
    permutation_p,
    promised_threshold,
    texts_for,
    win_rates,
)
from trimtab.vectors.content import VectorMetadata, model_name
from trimtab.vectors.probe import Probe

if TYPE_CHECKING:  # torch is loaded by whoever has a model, not by this module
    from trimtab.engines.transformers import SteeredModel

__all__ = ["LayerResult", "Operating", "ProbeReport", "Unpromised", "train_probe"]

TokenChoice = Literal["all", "last"]
FALSE_POSITIVE_RATES = (0.01, 0.05, 0.1)
FEWEST_TEXTS = 20  # of either label: fewer leave so few to report on that chance can do anything
FEWEST_IN_A_PART = 5
FOLDS = 3
UNITS: tuple[Unit, ...] = ("token", "text")

Rows = npt.NDArray[np.float32]  # [tokens, H]


def train_probe(
    model: "SteeredModel",
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    hook_point: HookPoint | str = HookPoint.POST_BLOCK,
    token: TokenChoice = "all",
    rates: Sequence[float] = FALSE_POSITIVE_RATES,
    groups: Sequence[Hashable] | None = None,
    held_out: float = 0.5,
    confidence: float = 0.95,
    significance: float = 0.01,
    regularization: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbeReport:
    """Train a probe for what `positive` texts have and `negative` ones lack, at the layer that tells them apart best.

    A share `held_out` of the texts of each label is kept from training: one half sets a threshold for each of `rates`
    (promised with `confidence`), the other half reports, and decides whether the probe is better than chance at the
    level `significance`. Texts that differ in case, spaces and punctuation alone, and those of one of `groups` (one for
    each positive text, then for each negative one), stay in one part and count once. `regularization` is scikit-learn's
    C on standardised activations. A probe no better than chance is returned too: see `ProbeReport.better_than_chance`.

    Raises SteeringError for fewer than 20 different texts of a label, for equal texts in both, for activations that are
    not finite, and for layers or hook points that the model does not have.
    """
    _check(hook_point, token, {"held_out": held_out, "confidence": confidence, "significance": significance}, rates)
    wanted = range(model.sites.num_layers) if layers is None else sorted(set(layers))
    sites = [Site(layer, HookPoint(hook_point)) for layer in wanted]
    if not sites:
        raise SteeringError("layers", "no layer is given")
    everything = LabelledTexts.of(positive, negative, groups)
    parts = everything.parts((1 - held_out, held_out / 2, held_out / 2), seed)
    _check_enough(everything, parts, held_out)
    training, thresholds, report = parts

    rows = _read(model, training, sites, batch_size, last_only=token == "last")
    results = tuple(LayerResult(site, _cross_validated(rows[site], training, regularization, seed)) for site in sites)
    best = max(results, key=lambda result: result.auroc).site
    direction, bias = _fit(rows[best], training.positive, regularization, seed)
    probe = Probe.at(best, direction, bias)
    del rows

    calm = _scores(model, probe, thresholds, batch_size, positive=False)
    fired, quiet = (_scores(model, probe, report, batch_size, positive=label) for label in (True, False))
    judged = [one[-1:] for one in (*fired, *quiet)] if token == "last" else [*fired, *quiet]
    labels = np.arange(len(judged)) < len(fired)
    wins = win_rates(judged)
    tops = win_rates([one.max(keepdims=True) for one in (*fired, *quiet)])
    operatings, unpromised = [], []
    supported = [rate for rate in rates if len(calm) >= texts_for(rate, confidence)]
    for unit in UNITS:
        promised = supported
        unpromised += [_unpromised(unit, rate, len(calm), confidence) for rate in rates if rate not in promised]
        if len(promised) < len(rates):  # what these texts do support
            promised = sorted({*promised, lowest_promise(len(calm), confidence)})
        operatings += [_operating(unit, rate, confidence, calm, fired, quiet) for rate in promised]
    about = ProbeReport(
        probe,
        auroc=auroc_interval(wins, labels, confidence),
        auroc_of_texts=auroc_interval(tops, labels, confidence),
        p_value=permutation_p(wins, labels, _unit_groups(report), seed),
        significance=significance,
        confidence=confidence,
        layers=results,
        thresholds=tuple(operatings),
        unpromised=tuple(unpromised),
        trained_on=training.count(),
        thresholds_from=thresholds.count(),
        reported_on=report.count(),
        repeated=len(everything.texts) - sum(everything.count()),
    )
    return about.with_metadata(
        VectorMetadata(
            base_model=model_name(model.model.config),
            method="logistic regression",
            source=f"{len(positive)} positive and {len(negative)} negative texts",
            extra={"token": token, "held_out": f"{held_out:g}", **_told(about)},
        )
    )


def _read(
    model: "SteeredModel", texts: LabelledTexts, sites: list[Site], batch_size: int, *, last_only: bool
) -> dict[Site, list[Rows]]:
    """Activations of each text, [tokens, H], by site."""
    found: dict[Site, list[Rows]] = {site: [] for site in sites}
    for text, arrays in zip(
        texts.texts, model.activations(list(texts.texts), sites, batch_size=batch_size), strict=True
    ):
        for site in sites:
            if not np.isfinite(arrays[site]).all():
                raise SteeringError("model", f"its activations at {site} are not finite for the text {text!r:.60}")
            found[site].append(arrays[site][-1:] if last_only else arrays[site])
    return found


def _scores(
    model: "SteeredModel", probe: Probe, texts: LabelledTexts, batch_size: int, *, positive: bool
) -> list[Floats]:
    """The probe's score of every token, for each independent unit of one label."""
    direction = probe.direction.astype(np.float64)
    part = texts.take(texts.positive == positive)
    rows = _read(model, part, [probe.site], batch_size, last_only=False)[probe.site]
    scores = [one.astype(np.float64) @ direction + probe.bias for one in rows]
    return [np.concatenate([scores[i] for i in unit]) for unit in part.units()]


def _unit_groups(report: LabelledTexts) -> npt.NDArray[np.int64]:
    """The group of each unit, positive ones first."""
    halves = [report.take(report.positive == label) for label in (True, False)]
    return np.array([half.groups[unit[0]] for half in halves for unit in half.units()], np.int64)


def _cross_validated(rows: list[Rows], texts: LabelledTexts, c: float, seed: int) -> float:
    """The mean AUROC, over folds, of tokens of texts that the fold's probe was not trained on."""
    found = []
    fold = texts.partition([1.0] * FOLDS, seed)
    for number in range(FOLDS):
        held, labels = fold == number, texts.positive[fold == number]
        if labels.all() or not labels.any():  # so few groups that this fold has one label alone
            continue
        direction, bias = _fit([rows[i] for i in np.flatnonzero(~held)], texts.positive[~held], c, seed)
        scores = [rows[i].astype(np.float64) @ direction + bias for i in np.flatnonzero(held)]
        found.append(auroc(win_rates(scores), labels))
    return float(np.mean(found)) if found else 0.5


def _fit(texts: list[Rows], positive: npt.NDArray[np.bool_], c: float, seed: int) -> tuple[Floats, float]:
    """Direction and bias in the activations' own units: the standardisation is folded in."""
    from sklearn.linear_model import LogisticRegression

    rows = np.concatenate(texts)
    labels = np.repeat(positive, [len(one) for one in texts])
    mean, scale = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    scale[scale == 0.0] = 1.0  # a constant column says nothing, and its weight stays 0
    model = LogisticRegression(C=c, max_iter=1000, class_weight="balanced", random_state=seed)
    model.fit((rows - mean) / scale, labels)
    direction = np.asarray(model.coef_[0] / scale, np.float64)
    return direction, float(model.intercept_[0] - mean @ direction)


def _operating(
    unit: Unit, rate: float, confidence: float, calm: list[Floats], fired: list[Floats], quiet: list[Floats]
) -> Operating:
    """The threshold that `calm` texts promise, and what it gives on the texts of the report."""
    scores = calm if unit == "token" else [one.max(keepdims=True) for one in calm]
    threshold = promised_threshold(scores, rate, confidence)
    assert threshold is not None  # the caller has asked whether these texts suffice

    def share(texts: list[Floats], of: Unit) -> Floats:
        return np.array(
            [(one > threshold).mean() if of == "token" else (one > threshold).any() for one in texts], float
        )

    return Operating(
        unit,
        rate,
        threshold,
        confidence,
        false_positives_per_token=mean_interval(share(quiet, "token"), confidence),
        false_positives_per_text=mean_interval(share(quiet, "text"), confidence),
        true_positives_per_token=mean_interval(share(fired, "token"), confidence),
        true_positives_per_text=mean_interval(share(fired, "text"), confidence),
    )


def _unpromised(unit: Unit, rate: float, texts: int, confidence: float) -> Unpromised:
    return Unpromised(unit, rate, lowest_promise(texts, confidence), texts, texts_for(rate, confidence))


def _told(report: ProbeReport) -> dict[str, str]:
    """What a probe's file says of how it was judged."""
    promises = [
        {"of": one.unit, "rate": round(one.false_positive_rate, 6), "threshold": one.threshold}
        for one in report.thresholds
    ]
    return {
        "auroc": f"{report.auroc.value:.4f}",
        "auroc_interval": f"{report.auroc.low:.4f} to {report.auroc.high:.4f}",
        "p_value": f"{report.p_value:.4g}",
        "better_than_chance": "yes" if report.better_than_chance else "no",
        "reported_on": "{} positive and {} negative texts".format(*report.reported_on),
        "confidence": f"{report.confidence:g}",
        "thresholds": json.dumps(promises),
    }


def _check(hook_point: HookPoint | str, token: str, shares: dict[str, float], rates: Sequence[float]) -> None:
    if token not in ("all", "last"):
        raise SteeringError("token", f"got {token!r}; want 'all' or 'last'")
    if hook_point not in set(HookPoint):
        raise SteeringError("hook_point", f"got {hook_point!r}; want one of {', '.join(HookPoint)}")
    for name, share in shares.items():
        if not 0.0 < share < 1.0:
            raise SteeringError(name, f"got {share}; want a share between 0 and 1")
    for rate in rates:
        if not 0.0 < rate <= 1.0:
            raise SteeringError("rates", f"got {rate}; want false-positive rates above 0, at most 1")


def _check_enough(everything: LabelledTexts, parts: list[LabelledTexts], held_out: float) -> None:
    for label, name in enumerate(("positive", "negative")):
        count = everything.count()[label]
        if count < FEWEST_TEXTS:
            raise SteeringError(name, f"has {count} different texts; want {FEWEST_TEXTS} or more, in three parts")
        if (fewest := min(part.count()[label] for part in parts)) < FEWEST_IN_A_PART:
            raise SteeringError(
                "held_out", f"{held_out:g} leaves {fewest} {name} texts in a part; want {FEWEST_IN_A_PART} in each"
            )
