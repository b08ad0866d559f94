"""What the demonstration promises, each promise as a check on what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.demo.contrast import Feature
from trimtab.demo.experiment import USEFUL, Column, SweepPoint
from trimtab.training.statistics import Interval, difference_interval

MOST_DRIFT: Mapping[Feature, float] = {"formality": 0.25, "sentiment": 0.35}
OTHER: Mapping[Feature, str] = {"sentiment": "formal", "formality": "positive"}  # the share that should stay


@dataclass(frozen=True)
class Check:
    """One promise: what it says, what was measured, and whether it holds."""

    promise: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Drift:
    """How far a vector moves the share that is not its own, at the strength where it does so most."""

    feature: Feature
    strength: float
    moved: Interval  # from strength 0

    @property
    def most(self) -> float:
        """What can be ruled out to be exceeded: the farther end of the interval."""
        return max(abs(self.moved.low), abs(self.moved.high))


def check_all(columns: Mapping[str, Column], rows: int, equal_rows: int, sweep: Sequence[SweepPoint]) -> list[Check]:
    """Every promise. `equal_rows` of `rows` unsteered outputs are the plain model's."""
    shares = {name: column.shares for name, column in columns.items()}
    unsteered, positive, both = shares["unsteered"], shares["positive"], shares["positive and formal"]
    formal, informal = shares["formal"], shares["informal"]
    fewest = min(column.sentences for column in shares.values())
    parsed = min(column.parsed for name, column in shares.items() if name != "unsteered")
    return [
        Check("unsteered rows are the plain model's, token by token", f"{equal_rows} of {rows}", equal_rows == rows),
        Check("at least 64 sentences in every column", f"{fewest}", fewest >= 64),
        _share("unsteered: 35 to 65 % positive", unsteered.positive, 0.35, 0.65),
        _share("positive: at least 90 % positive", positive.positive, 0.90, 1.0),
        _share("negative: at most 10 % positive", shares["negative"].positive, 0.0, 0.10),
        _points(
            "formality alone moves the formal share by at least 50 points", formal.formal - informal.formal, 0.5, 1
        ),
        _points(
            "formality added to positive raises the formal share by at least 20", both.formal - positive.formal, 0.2, 1
        ),
        _points("... and moves sentiment by at most 15", abs(both.positive - positive.positive), 0, 0.15),
        _drift(worst_drift(sweep, "formality", USEFUL), "formality", "sentiment"),
        _drift(worst_drift(sweep, "sentiment", USEFUL), "sentiment", "formality"),
        _share("at least 85 % of the steered sentences parse, in every column", parsed, 0.85, 1.0),
    ]


def worst_drift(sweep: Sequence[SweepPoint], feature: Feature, strongest: float) -> Drift:
    """The largest drift, by the far end of its interval, over all strengths of up to `strongest`."""
    share = OTHER[feature]
    points = [point for point in sweep if point.feature == feature]
    (base,) = (point.intervals[share] for point in points if point.strength == 0)
    drifts = [
        Drift(feature, point.strength, difference_interval(point.intervals[share], base))
        for point in points
        if point.strength and abs(point.strength) <= strongest
    ]
    return max(drifts, key=lambda drift: drift.most)


def points_of(moved: Interval) -> str:
    """A difference of shares, in points, with its interval."""
    return f"{100 * moved.value:+.0f} points ({100 * moved.low:+.0f} to {100 * moved.high:+.0f})"


def _drift(drift: Drift, mover: str, moved: str) -> Check:
    most = MOST_DRIFT[drift.feature]
    promise = f"at every strength from -1 to 1 {mover} moves {moved} by at most {100 * most:.0f} points"
    return Check(f"{promise}, interval included", points_of(drift.moved), drift.most <= most)


def _share(promise: str, value: float, least: float, most: float) -> Check:
    return Check(promise, f"{value:.1%}", least <= value <= most)


def _points(promise: str, value: float, least: float, most: float) -> Check:
    return Check(promise, f"{100 * value:.0f} points", least <= value <= most)
