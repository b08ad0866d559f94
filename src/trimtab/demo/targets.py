"""What the demonstration promises, each promise as a check on what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trimtab.demo.experiment import Column, SweepPoint


@dataclass(frozen=True)
class Check:
    """One promise: what it says, what was measured, and whether it holds."""

    promise: str
    measured: str
    holds: bool


def check_all(columns: Mapping[str, Column], sweep: Sequence[SweepPoint], rows: int, equal_rows: int) -> list[Check]:
    """Every promise. `equal_rows` of `rows` unsteered outputs are the plain model's."""
    shares = {name: column.shares for name, column in columns.items()}
    alone = {
        point.strength: point.shares for point in sweep if point.feature == "formality" and point.strength in (-1, 0, 1)
    }
    positive, both = shares["positive"], shares["positive and formal"]
    drift = max(abs(alone[s].positive - alone[0].positive) for s in (-1, 1))
    fewest = min(column.sentences for column in shares.values())
    parsed = min(column.parsed for name, column in shares.items() if name != "unsteered")
    return [
        Check("unsteered rows are the plain model's, token by token", f"{equal_rows} of {rows}", equal_rows == rows),
        Check("at least 64 sentences in every column", f"{fewest}", fewest >= 64),
        _share("unsteered: 35 to 65 % positive", shares["unsteered"].positive, 0.35, 0.65),
        _share("positive: at least 90 % positive", positive.positive, 0.90, 1.0),
        _share("negative: at most 10 % positive", shares["negative"].positive, 0.0, 0.10),
        _share("steered sentences that the grammar parses: at least 85 %", parsed, 0.85, 1.0),
        _points(
            "formality vector on top: formal share rises by at least 25 points", both.formal - positive.formal, 0.25, 1
        ),
        _points("... and sentiment stays within 15 points", abs(both.positive - positive.positive), 0, 0.15),
        _points(
            "formality vector alone, both ways: formal share moves by at least 50 points",
            alone[1].formal - alone[-1].formal,
            0.5,
            1,
        ),
        _points("... and sentiment stays within 15 points", drift, 0, 0.15),
    ]


def _share(promise: str, value: float, least: float, most: float) -> Check:
    return Check(promise, f"{value:.1%}", least <= value <= most)


def _points(promise: str, value: float, least: float, most: float) -> Check:
    return Check(promise, f"{100 * value:.0f} points", least <= value <= most)
