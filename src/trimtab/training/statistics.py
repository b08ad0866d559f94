"""What labelled texts can support: rank statistics and bounds whose unit is the text, not the token.

Tokens of one text are alike, so forty tokens of one text are worth far less than forty texts. Everything here takes one
*group* of tokens per independent text and counts each text once. Nothing is assumed of how scores are distributed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

PERMUTATIONS = 4999
_BATCH = 500  # relabellings held in memory at once


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


# --- how well scores tell two sets of texts apart


def win_rates(scores: Sequence[Floats]) -> Floats:
    """[T, T]: how often a token of text i scores above one of text j, ties counting one half."""
    rates = np.empty((len(scores), len(scores)))
    lengths = np.array([len(one) for one in scores])
    starts = np.cumsum(lengths) - lengths
    together = np.concatenate(list(scores))
    for j, other in enumerate(scores):
        ordered = np.sort(other)
        below = np.searchsorted(ordered, together, "left") + np.searchsorted(ordered, together, "right")
        rates[:, j] = np.add.reduceat(below, starts) / (2 * len(other) * lengths)
    return rates


def auroc(rates: Floats, positive: Flags) -> float:
    """The chance that a token of a random positive text scores above one of a random negative text."""
    return float(rates[np.ix_(positive, ~positive)].mean())


def auroc_interval(rates: Floats, positive: Flags, confidence: float) -> Interval:
    """The AUROC with an interval that stays sensible for few texts and near 1.

    Newcombe's score-type interval (Statistics in Medicine 25, 2006, 559-573, method 5) treats all tokens of a text as
    one. Where DeLong's estimate, over texts, finds a smaller variance, because the tokens of a text differ, the
    interval is narrowed by that ratio, down to one eighth; quantiles are Student's.
    """
    from scipy.stats import t as student

    m, n = int(positive.sum()), int((~positive).sum())
    pairs = rates[np.ix_(positive, ~positive)]
    value = float(pairs.mean())
    extra = (m + n) / 2 - 1

    def variance(other: float) -> float:
        return other * (1 - other) * (1 + extra * ((1 - other) / (2 - other) + other / (1 + other))) / (m * n)

    observed = float(pairs.mean(1).var(ddof=1)) / m + float(pairs.mean(0).var(ddof=1)) / n
    ratio = min(max(observed / variance(value), 0.125), 1.0) if observed and 0 < value < 1 else 1.0
    reach = ratio * float(student.ppf((1 + confidence) / 2, min(m, n) - 1)) ** 2

    def inside(other: float) -> bool:
        return (value - other) ** 2 <= reach * variance(other)

    return Interval(value, _boundary(inside, value, 0.0), _boundary(inside, value, 1.0))


def permutation_p(
    rates: Floats, positive: Flags, groups: npt.NDArray[np.int64], seed: int, permutations: int = PERMUTATIONS
) -> float:
    """The share of relabellings of the texts whose AUROC reaches the one found, the found one counted among them.

    `rates` [T, T] is of one scoring; with several, [S, T, T], it is their best AUROC that is compared.

    Texts of one group that all carry one label are relabelled together; a group with both labels is shuffled within.
    For scores that were fixed without these texts, a probe that knows nothing has p <= a in at most a share a of all
    cases.
    """
    rng = np.random.default_rng(seed)
    several = rates.reshape(-1, *rates.shape[-2:])
    found = max(auroc(one, positive) for one in several)
    reached, left = 1, permutations
    while left:
        count = min(left, _BATCH)
        labels = relabelled(positive, groups, count, rng).astype(np.float64)
        wins = np.max([np.einsum("bt,bt->b", labels @ one, 1 - labels) for one in several], axis=0)
        pairs = labels.sum(1) * (1 - labels).sum(1)
        reached += int((wins / pairs >= found - 1e-12).sum())
        left -= count
    return reached / (permutations + 1)


def relabelled(positive: Flags, groups: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> Flags:
    """[count, T]: labels shuffled among groups of one label, and within groups of both."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    pure = [one for one in members if len(set(positive[one])) == 1]
    mixed = [one for one in members if len(set(positive[one])) == 2]
    shuffled = np.tile(positive, (count, 1))
    if pure:
        labels = rng.permuted(np.tile([positive[one[0]] for one in pure], (count, 1)), axis=1)
        for column, one in enumerate(pure):
            shuffled[:, one] = labels[:, [column]]
    for one in mixed:
        shuffled[:, one] = rng.permuted(shuffled[:, one], axis=1)
    return shuffled


# --- bounds of a mean of numbers from 0 to 1


def mean_interval(values: Floats, confidence: float) -> Interval:
    """The mean of independent numbers from 0 to 1, such as shares of tokens per text, with a two-sided interval.

    Hoeffding's bound (Journal of the American Statistical Association 58, 1963, theorem 1): it holds for any
    distribution and any number of texts; for yes-or-no values it is a little wider than Clopper and Pearson's.
    """
    mean, n, tail = float(values.mean()), len(values), (1 - confidence) / 2

    def inside(other: float) -> bool:
        return n * divergence(mean, other) <= -math.log(tail)

    return Interval(mean, _boundary(inside, mean, 0.0), _boundary(inside, mean, 1.0))


def share_interval(hits: Floats, counts: Floats, confidence: float) -> Interval:
    """The share of `hits` [texts] among `counts` [texts], with Wilson's interval for texts whose parts are alike.

    The number of parts is divided by the design effect, the variance between texts over that of independent parts. NaN
    and the whole range where nothing was counted.
    """
    texts, total = int((counts > 0).sum()), float(counts.sum())
    if texts == 0:
        return Interval(math.nan, 0.0, 1.0)
    share = float(hits.sum()) / total
    alone = share * (1 - share) / total
    found = texts / max(texts - 1, 1) * float(((hits - share * counts) ** 2).sum()) / total**2
    effect = min(max(found / alone, 1.0), total / texts) if alone and texts > 1 else total / texts
    n, z = total / effect, NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, min(max(middle - reach, 0.0), share), max(min(middle + reach, 1.0), share))


def difference_interval(one: Interval, other: Interval) -> Interval:
    """`one` less `other`, independent of it (Newcombe, Statistics in Medicine 17, 1998, 873-890, method 10)."""
    value = one.value - other.value
    below = math.hypot(one.value - one.low, other.high - other.value)
    above = math.hypot(one.high - one.value, other.value - other.low)
    return Interval(value, value - below, value + above)


def divergence(mean: float, rate: float) -> float:
    """Kullback and Leibler's, of a coin of chance `mean` from one of chance `rate`, in nats."""
    total = 0.0
    for p, q in ((mean, rate), (1 - mean, 1 - rate)):
        if p > 0:
            total += p * math.log(p / q) if q > 0 else math.inf
    return max(total, 0.0)


def lowest_promise(texts: int, confidence: float) -> float:
    """The lowest rate that can be promised with `confidence` where not one of `texts` texts exceeded the threshold."""
    return float(-math.expm1(math.log1p(-confidence) / texts)) if texts else 1.0


def texts_for(rate: float, confidence: float) -> int:
    """How many texts a promise of `rate` needs at least: 59 for 5 % with 95 % confidence."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate) - 1e-9) if 0 < rate < 1 else 1


def promised_threshold(scores: Sequence[Floats], rate: float, confidence: float) -> float | None:
    """The lowest threshold at which, with `confidence`, at most a share `rate` of fresh scores lies above it.

    `scores` holds those of each text; a fresh score is a random one of a fresh text. With a promise that cannot be kept
    by so few texts the answer is None. The bound is Hoeffding's at every threshold above the one returned, and since
    the share above falls as the threshold rises, choosing among thresholds costs nothing (Bates et al.,
    "Distribution-Free, Risk-Controlling Prediction Sets", arXiv:2101.02703).
    """
    n = len(scores)
    if rate >= 1:
        return float(min(one.min() for one in scores)) - 1.0
    if rate <= 0 or n < texts_for(rate, confidence):
        return None
    together = np.concatenate(list(scores))
    weights = np.concatenate([np.full(len(one), 1 / (n * len(one))) for one in scores])
    values, place = np.unique(together, return_inverse=True)
    above = np.cumsum(np.bincount(place, weights)[::-1])[::-1]  # the share at or above each value
    needed = math.log1p(-confidence)
    allowed = [i for i in range(len(values)) if above[i] < rate and -n * divergence(float(above[i]), rate) <= needed]
    if not allowed:  # nothing may exceed it; a little room, so that rounding in the model does not decide
        return float(values[-1] + 1e-3 * (together.std() or 1.0))
    lowest = allowed[0]
    return float(values[lowest - 1] + values[lowest]) / 2 if lowest else float(values[0]) - 1.0


# --- helpers


def _boundary(inside: Callable[[float], bool], start: float, end: float) -> float:
    """Where `inside`, true at `start`, turns false on the way to `end`; `end` where it never does."""
    if inside(end):
        return end
    for _ in range(60):
        middle = (start + end) / 2
        start, end = (middle, end) if inside(middle) else (start, middle)
    return start
