"""Probes from labelled texts: logistic regression on activations, layer by layer, judged on texts held out.

A linear probe in the sense of Alain and Bengio, "Understanding intermediate layers using linear classifier probes"
(arXiv:1610.01644). Every token of a training text carries its text's label, since a gate scores every token; in
`last` mode only the last one does.

The scores of the probe are log-odds: `x . direction + bias` is 0 where both labels are equally likely, so a gate with
`threshold` 0 and `sharpness` 1 opens with the probability that the classifier gives.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import VectorMetadata

if TYPE_CHECKING:  # torch is loaded by whoever has a model, not by this module
    from trimtab.engines.transformers import SteeredModel

TokenChoice = Literal["all", "last"]
FALSE_POSITIVE_RATES = (0.01, 0.05, 0.1)

Rows = npt.NDArray[np.float32]  # [tokens, H]


@dataclass(frozen=True)
class LayerResult:
    """How well one layer's probe separates the held-out texts."""

    site: Site
    auroc: float


@dataclass(frozen=True)
class Operating:
    """A threshold for a stated false-positive rate, and what it gives on the held-out texts' tokens."""

    false_positive_rate: float  # as asked for
    threshold: float
    measured_false_positive_rate: float  # at most the one asked for
    true_positive_rate: float


@dataclass(frozen=True)
class ProbeReport:
    """The probe of the best layer, and how it was chosen."""

    probe: Probe
    auroc: float
    layers: tuple[LayerResult, ...]
    thresholds: tuple[Operating, ...]
    trained_on: int  # texts
    held_out: int  # texts


def train_probe(
    model: "SteeredModel",
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    hook_point: HookPoint | str = HookPoint.POST_BLOCK,
    token: TokenChoice = "all",
    rates: Sequence[float] = FALSE_POSITIVE_RATES,
    held_out: float = 0.3,
    regularization: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
) -> ProbeReport:
    """Train a probe for what `positive` texts have and `negative` ones lack, at the layer that tells them apart best.

    A share `held_out` of the texts of each list is kept from training; per-layer AUROC and thresholds are those of its
    tokens. `regularization` is scikit-learn's C on standardised activations. Raises SteeringError for lists of fewer
    than 4 texts, for equal texts in both, and for layers or hook points that the model does not have.
    """
    _check(positive, negative, hook_point, token, held_out, rates)
    wanted = range(model.sites.num_layers) if layers is None else sorted(set(layers))
    sites = [Site(layer, HookPoint(hook_point)) for layer in wanted]
    if not sites:
        raise SteeringError("layers", "no layer is given")
    texts = [*positive, *negative]
    labels = np.array([1] * len(positive) + [0] * len(negative))
    tests = _split(labels, held_out, seed)
    chosen = [
        {site: rows if token == "all" else rows[-1:] for site, rows in arrays.items()}
        for arrays in model.activations(texts, sites, batch_size=batch_size)
    ]
    owner = np.repeat(np.arange(len(texts)), [len(arrays[sites[0]]) for arrays in chosen])
    results, probes = [], []
    for site in sites:
        rows = np.concatenate([arrays[site] for arrays in chosen])
        train = ~tests[owner]
        direction, bias = _fit(rows[train], labels[owner][train], regularization, seed)
        probes.append((direction, bias))
        results.append(LayerResult(site, _auroc(rows[~train] @ direction + bias, labels[owner][~train])))
    best = max(range(len(sites)), key=lambda index: results[index].auroc)
    direction, bias = probes[best]
    metadata = VectorMetadata(
        base_model=str(getattr(model.model.config, "_name_or_path", "")),
        method="logistic regression",
        source=f"{len(positive)} positive and {len(negative)} negative texts",
        extra={"auroc": f"{results[best].auroc:.4f}", "token": token, "held_out": f"{held_out:g}"},
    )
    probe = Probe.at(sites[best], direction, float(bias), metadata)
    held = np.flatnonzero(tests[owner])
    rows = np.concatenate([arrays[sites[best]] for arrays in chosen])[held]
    scores = rows.astype(np.float64) @ probe.direction.astype(np.float64) + probe.bias
    thresholds = tuple(_operating(scores, labels[owner][held], rate) for rate in rates)
    return ProbeReport(probe, results[best].auroc, tuple(results), thresholds, int((~tests).sum()), int(tests.sum()))


def _fit(rows: Rows, labels: npt.NDArray[np.int64], c: float, seed: int) -> tuple[npt.NDArray[np.float64], float]:
    """Direction and bias in the activations' own units: the standardisation is folded in."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    scale[scale == 0.0] = 1.0  # a constant column says nothing, and its weight stays 0
    model = LogisticRegression(C=c, max_iter=1000, class_weight="balanced", random_state=seed)
    model.fit((rows - mean) / scale, labels)
    direction = np.asarray(model.coef_[0] / scale, np.float64)
    return direction, float(model.intercept_[0] - mean @ direction)


def _auroc(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def _operating(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], rate: float) -> Operating:
    """The lowest threshold that at most a share `rate` of the negative scores exceed."""
    negative = np.sort(scores[labels == 0])[::-1]
    allowed = int(np.floor(rate * len(negative)))
    # Between the last score that may exceed it and the next lower one, so that float32 does not decide.
    upper = negative[allowed - 1] if allowed else negative[0] + 1.0
    threshold = float(negative[allowed] + upper) / 2 if allowed < len(negative) else float(negative[-1]) - 1.0
    return Operating(
        rate, threshold, float((negative > threshold).mean()), float((scores[labels == 1] > threshold).mean())
    )


def _split(labels: npt.NDArray[np.int64], held_out: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which texts are held out: the same share of each label, at least one, and at least one left."""
    rng = np.random.default_rng(seed)
    tests = np.zeros(len(labels), np.bool_)
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(held_out * len(members))), len(members) - 1)
        tests[rng.permutation(members)[:count]] = True
    return tests


def _check(
    positive: Sequence[str],
    negative: Sequence[str],
    hook_point: HookPoint | str,
    token: str,
    held_out: float,
    rates: Sequence[float],
) -> None:
    if token not in ("all", "last"):
        raise SteeringError("token", f"got {token!r}; want 'all' or 'last'")
    if hook_point not in set(HookPoint):
        raise SteeringError("hook_point", f"got {hook_point!r}; want one of {', '.join(HookPoint)}")
    for name, texts in (("positive", positive), ("negative", negative)):
        if isinstance(texts, str) or len(texts) < 4:
            raise SteeringError(name, "want a list of four or more texts")
    if both := set(positive) & set(negative):
        raise SteeringError("negative", f"{len(both)} texts are positive as well, such as {min(both)!r:.60}")
    if not 0.0 < held_out < 1.0:
        raise SteeringError("held_out", f"got {held_out}; want a share between 0 and 1")
    for rate in rates:
        if not 0.0 <= rate <= 1.0:
            raise SteeringError("rates", f"got {rate}; want false-positive rates from 0 to 1")
