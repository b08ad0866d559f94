"""From two lists of prompts to a vector that steers: its layer and its strength, chosen by trying.

A third of the prompts is held out. The mean differences come from the others; those held out say which layers' vectors
tell the two lists apart, and what each dose does to their likelihood and to the text that the model writes (see
`trials`). The layer is the one whose vector has the largest effect while text stays calm; the strength is the smallest
dose with most of that effect, tried once more with other samples. The vector returned is scaled so that scale 1 is the
advised strength.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.training.extraction import Readings, TokenChoice, check_prompts, difference, read, wanted_sites
from trimtab.training.parts import LabelledTexts
from trimtab.training.statistics import auroc, permutation_p, win_rates
from trimtab.training.trials import LEAST_EFFECT, Trial, Trials
from trimtab.vectors.dose import DOSE_LIMIT, dose_of
from trimtab.vectors.vector import SteeringVector

DOSES = (0.1, 0.15, 0.25, 0.4, 0.6, 0.9, 1.3)
FEWEST_PROMPTS = 20
CONTINUED = 24  # texts under each dose
CANDIDATES = 4  # layers that are tried
CALM = 0.15  # nats of surprise: what is advised keeps well below the limit of intact text
ENOUGH = 0.6  # of the largest effect of calm text
SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class LayerSeparation:
    """How well a layer's vector tells the held-out prompts apart, and how long it is beside the stream."""

    site: Site
    auroc: float
    norm: float
    stream_norm: float


@dataclass(frozen=True)
class TunedVector:
    """A vector and what was found by trying it. With a `problem` it is not known to steer, and is as extracted."""

    vector: SteeringVector
    problem: str
    separations: tuple[LayerSeparation, ...]
    separation_p: float  # that no layer separates the lists, the choice among layers included
    trials: tuple[Trial, ...]  # of every layer tried, in the mean differences' own scales
    confirmed: Trial | None  # the chosen one with fresh samples
    dose_limit: float | None

    @property
    def usable(self) -> bool:
        """Whether steering with it was seen to work."""
        return not self.problem

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a script."""
        return {
            "problem": self.problem or None,
            "dose": None if self.confirmed is None else self.confirmed.dose,
            "dose_limit": self.dose_limit,
            "effect": None if self.confirmed is None else self.confirmed.effect,
            "separation_p": self.separation_p,
            "layers": [{**vars(one), "site": str(one.site)} for one in self.separations],
            "trials": [_plain(one) for one in self.trials],
            "confirmed": None if self.confirmed is None else _plain(self.confirmed),
        }


def tune_vector(
    model: SteeredModel,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    hook_point: HookPoint | str = HookPoint.POST_BLOCK,
    token: TokenChoice = "mean",
    prompts: Sequence[str] | None = None,
    doses: Sequence[float] = DOSES,
    tokens: int = 24,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> TunedVector:
    """Extract a vector at the best layer, or at all of `layers`, and find the scale at which it steers.

    `prompts` are continued in the trials instead of the first halves of those held out. Raises SteeringError as
    `extract_vector` does, and for fewer than 20 different prompts in a list.
    """
    sites = wanted_sites(model, layers, hook_point)
    check_prompts(positive, negative, token, batch_size)
    training, held = _split(positive, negative, seed)
    both = [*training.texts, *held.texts]
    readings = read(model, both, sites, token=token, batch_size=batch_size, progress=progress)
    first, second = (_part(readings, slice(*ends)) for ends in ((0, len(training.texts)), (len(training.texts), None)))
    vector = difference(model, first, training.positive, token)
    separations, p = _separations(vector, readings, second, held, seed)
    told: dict[str, Any] = {"separations": separations, "separation_p": p}
    if p > SIGNIFICANCE:
        problem = f"no layer's vector tells held-out prompts apart better than chance (p = {p:.2g})"
        return TunedVector(vector, problem, trials=(), confirmed=None, dose_limit=None, **told)

    trying = Trials(model, held.texts, held.positive, _beginnings(model, prompts, held), tokens, batch_size)
    trials: list[Trial] = []
    for number, chosen in enumerate(_candidates(separations, layers is not None)):
        narrow = vector.at(chosen)
        trials += trying.run(narrow, [dose / (dose_of(narrow) or 1.0) for dose in doses], seed + number)
    told["trials"] = tuple(trials)
    best = _advised(trials)
    if best is None:
        problem = f"no dose makes the positive prompts {LEAST_EFFECT:g} nats a token likelier and leaves text intact"
        return TunedVector(vector, problem, confirmed=None, dose_limit=None, **told)
    (again,) = trying.run(best.vector, [best.scale], seed + len(trials))
    p = permutation_p(win_rates([*best.gains[:, None]]), held.positive, held.groups, seed)
    if not again.intact or p > SIGNIFICANCE:
        problem = f"what the best dose did may be chance (p = {p:.2g}), or its text was not intact a second time"
        return TunedVector(vector, problem, confirmed=again, dose_limit=None, **told)
    limit = max(one.dose for one in _intact(trials, best.vector))
    tuned = best.vector * best.scale
    extra = {
        "scale_of_difference": f"{best.scale:.6g}",
        "dose": f"{best.dose:.4g}",
        DOSE_LIMIT: f"{limit:.4g}",
        "effect": f"{best.effect:.3g} nats a token",
    }
    about = replace(tuned.metadata, extra={**tuned.metadata.extra, **extra})
    return TunedVector(tuned.with_metadata(about), "", confirmed=again, dose_limit=limit, **told)


def _beginnings(model: SteeredModel, prompts: Sequence[str] | None, held: LabelledTexts) -> list[list[int]]:
    """What is continued to see whether text stays intact: `prompts`, or the first halves of those held out."""
    texts = list(prompts) if prompts else list(held.texts)
    ids = [[int(token) for token in model.tokenizer(text)["input_ids"]] for text in texts]
    begun = ids if prompts else [row[: (len(row) + 1) // 2] for row in ids]
    return (begun * -(-CONTINUED // len(begun)))[:CONTINUED]


def _split(positive: Sequence[str], negative: Sequence[str], seed: int) -> tuple[LabelledTexts, LabelledTexts]:
    pairs = [*range(len(positive))] * 2 if len(positive) == len(negative) else None  # harmless where they are none
    everything = LabelledTexts.of(positive, negative, pairs)
    for name, count in zip(("positive", "negative"), everything.count(), strict=True):
        if count < FEWEST_PROMPTS:
            raise SteeringError(
                name,
                f"has {count} different prompts; want {FEWEST_PROMPTS} or more, of which a third is held out to try "
                "the vector on; `extract_vector` (--no-sweep) takes fewer, and tries nothing",
            )
    training, held = everything.parts((2, 1), seed)
    return training, held


def _part(readings: Readings, which: slice) -> Readings:
    return Readings(readings.sites, readings.values[which], readings.stream_norms)


def _separations(
    vector: SteeringVector, readings: Readings, second: Readings, held: LabelledTexts, seed: int
) -> tuple[tuple[LayerSeparation, ...], float]:
    rates = []
    for site in vector.sites:
        along = second.projected(site, vector.directions[site])
        rates.append(win_rates([*along[:, None]]))
    p = permutation_p(np.stack(rates), held.positive, held.groups, seed)
    norms = vector.norms()
    found = [
        LayerSeparation(site, auroc(rate, held.positive), norms[site], readings.stream_norms[site])
        for site, rate in zip(vector.sites, rates, strict=True)
    ]
    return tuple(found), p


def _candidates(separations: Sequence[LayerSeparation], given: bool) -> list[list[int]]:
    """Which layers to try: all that were given, together; else some of those that separate best, one at a time."""
    layers = [one.site.layer for one in separations]
    if given:
        return [layers]
    best = max(one.auroc for one in separations)
    good = [one.site.layer for one in separations if one.auroc >= best - 0.05]
    places = np.linspace(0, len(good) - 1, CANDIDATES + 2)[1:-1] if len(good) > CANDIDATES else np.arange(len(good))
    return [[good[round(float(place))]] for place in places]


def _intact(trials: Sequence[Trial], vector: SteeringVector) -> list[Trial]:
    """The trials of `vector` up to the first dose that breaks text."""
    mine = sorted((one for one in trials if one.vector is vector), key=lambda one: one.dose)
    broken = next((place for place, one in enumerate(mine) if not one.intact), len(mine))
    return mine[:broken]


def _advised(trials: Sequence[Trial]) -> Trial | None:
    """The smallest dose with most of the effect, at the layer with the largest effect of calm text."""
    calm = [
        one for one in trials if one.surprise <= CALM and any(one is whole for whole in _intact(trials, one.vector))
    ]
    if not calm or (best := max(calm, key=lambda one: one.effect)).effect < LEAST_EFFECT:
        return None
    mine = sorted((one for one in calm if one.vector is best.vector), key=lambda one: one.dose)
    return next(one for one in mine if one.effect >= ENOUGH * best.effect)


def _plain(trial: Trial) -> dict[str, Any]:
    numbers = {name: getattr(trial, name) for name in ("scale", "dose", "effect", "surprise", "repetition", "intact")}
    return {"sites": [str(site) for site in trial.vector.sites], **numbers}
