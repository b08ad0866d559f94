"""The demonstration's ablation and clamp keep their promises, and a promise that is missed is noticed."""

import math
from dataclasses import replace

import pytest
from rich.console import Console

from trimtab.demo import model_path
from trimtab.demo.directions import DirectionsResult, run_directions, show_directions
from trimtab.engines.transformers import SteeredModel


@pytest.fixture(scope="module")
def result() -> DirectionsResult:
    with SteeredModel.from_pretrained(model_path()) as model:
        return run_directions(model, 0)


def test_an_ablation_takes_the_header_away_and_a_clamp_lifts_complaints_alone(result: DirectionsResult) -> None:
    assert [check.promise for check in result.checks if not check.holds] == []
    assert result.hold("unsteered") > 0.9
    assert result.hold("ablate") < 0.5
    assert result.shares["clamp"]["negative"].positive > result.shares["add"]["negative"].positive + 0.3
    assert result.floor > 0


def test_the_terminal_shows_them_beside_the_addition(result: DirectionsResult) -> None:
    console = Console(width=120, record=True)
    show_directions(result, console)
    rows = [line.split()[0] for line in console.export_text().splitlines() if line.strip()]
    assert [row for row in rows if row in result.shares] == ["unsteered", "add", "ablate", "clamp"]


@pytest.mark.parametrize(
    ("spec", "header", "value"),
    [("ablate", "positive", 0.95), ("ablate", "positive", math.nan), ("clamp", "negative", 0.5),
     ("clamp", "positive", 0.8), ("unsteered", "positive", 0.3)],
)  # fmt: skip
def test_a_missed_promise_is_noticed(result: DirectionsResult, spec: str, header: str, value: float) -> None:
    shares = {name: dict(by) for name, by in result.shares.items()}
    shares[spec][header] = shares[spec][header]._replace(positive=value)
    assert not all(check.holds for check in replace(result, shares=shares).checks)
