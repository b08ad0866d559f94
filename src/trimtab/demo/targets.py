"""What the demonstration promises, each promise as a check on what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.demo.experiment import Column


@dataclass(frozen=True)
class Check:
    """One promise: what it says, what was measured, and whether it holds."""

    promise: str
    measured: str
    holds: bool


def check_all(columns: Mapping[str, Column], rows: int, equal_rows: int) -> list[Check]:
    """Every promise. `equal_rows` of `rows` unsteered outputs are the plain model's."""
    shares = {name: column.shares for name, column in columns.items()}
    unsteered, positive, both = shares["unsteered"], shares["positive"], shares["positive and formal"]
    formal, informal = shares["formal"], shares["informal"]
    fewest = min(column.sentences for column in shares.values())
    parsed = min(column.parsed for name, column in shares.items() if name != "unsteered")
    drift = max(abs(column.positive - unsteered.positive) for column in (formal, informal))
    return [
        Check("unsteered rows are the plain model's, token by token", f"{equal_rows} of {rows}", equal_rows == rows),
        Check("at least 64 sentences in every column", f"{fewest}", fewest >= 64),
        _share("unsteered: 35 to 65 % positive", unsteered.positive, 0.35, 0.65),
        _share("positive: at least 90 % positive", positive.positive, 0.90, 1.0),
        _share("negative: at most 10 % positive", shares["negative"].positive, 0.0, 0.10),
        _points(
            "formality alone moves the formal share by at least 50 points", formal.formal - informal.formal, 0.5, 1
        ),
        _points("... and sentiment by at most 15", drift, 0, 0.15),
        _points(
            "formality added to positive raises the formal share by at least 20", both.formal - positive.formal, 0.2, 1
        ),
        _points("... and moves sentiment by at most 15", abs(both.positive - positive.positive), 0, 0.15),
        _share("at least 85 % of the steered sentences parse, in every column", parsed, 0.85, 1.0),
    ]


def _share(promise: str, value: float, least: float, most: float) -> Check:
    return Check(promise, f"{value:.1%}", least <= value <= most)


def _points(promise: str, value: float, least: float, most: float) -> Check:
    return Check(promise, f"{100 * value:.0f} points", least <= value <= most)
