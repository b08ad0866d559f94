"""The demonstration: it measures what it says, keeps its promises, and fails where it does not."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.demo.contrast import Feature, contrasting_prompts
from trimtab.demo.experiment import COLUMNS, SWEEP, Column, SweepPoint, complete_sentences, intervals
from trimtab.demo.grammar import Shares
from trimtab.demo.targets import OTHER, check_all, worst_drift
from trimtab.training.statistics import Interval
from trimtab.vectors import SteeringVector


def good_columns() -> dict[str, Column]:
    shares = {
        "unsteered": Shares(200, 0.97, 0.5, 0.5),
        "positive": Shares(200, 0.95, 0.97, 0.5),
        "negative": Shares(200, 0.95, 0.03, 0.5),
        "positive and formal": Shares(200, 0.92, 0.96, 0.98),
        "formal": Shares(200, 0.96, 0.45, 0.95),
        "informal": Shares(200, 0.96, 0.55, 0.05),
    }
    return {name: Column(name, (), measured) for name, measured in shares.items()}


def good_sweep(**moved: float) -> list[SweepPoint]:
    """Every strength of both vectors, the share of the other feature at one half but for `moved[vector]` at +0.5."""
    points = []
    for feature, share in OTHER.items():
        for strength in SWEEP:
            value = 0.5 + (moved.get(feature, 0.0) if strength == 0.5 else 0.4 if abs(strength) > 1 else 0.0)
            points.append(
                SweepPoint(
                    feature, strength, Shares(400, 1.0, 0.5, 0.5), {share: Interval(value, value - 0.05, value + 0.05)}
                )
            )
    return points


def test_every_promise_holds_for_good_numbers() -> None:
    assert all(check.holds for check in check_all(good_columns(), 96, 96, good_sweep()))


@pytest.mark.parametrize(("feature", "drift"), [("formality", 0.22), ("formality", -0.22), ("sentiment", 0.33)])
def test_a_drift_at_any_useful_strength_is_noticed_with_its_interval(feature: Feature, drift: float) -> None:
    sweep = good_sweep(**{feature: drift})
    missed = [check for check in check_all(good_columns(), 96, 96, sweep) if not check.holds]
    (check,) = missed
    assert f"from -1 to 1 {feature} moves" in check.promise
    assert check.measured.startswith(f"{100 * drift:+.0f} points (")
    found = worst_drift(sweep, feature, 1.0)
    assert (found.strength, found.moved.value) == (0.5, pytest.approx(drift))
    assert abs(worst_drift(sweep, feature, 1.5).strength) > 1


def test_intervals_count_texts_and_not_their_sentences() -> None:
    alike = [" ".join(["The soup was " + word] * 3) for word in ("good.", "bad.") for _ in range(20)]
    found = intervals(alike)["positive"]
    assert found.value == 0.5
    reach = 1.96 * math.sqrt(0.25 / 40)  # of forty texts, not of 120 sentences
    assert found.high - found.value == pytest.approx(reach, rel=0.1)


@pytest.mark.parametrize(
    ("column", "field", "value"),
    [
        ("unsteered", "positive", 0.3),
        ("unsteered", "positive", 0.7),
        ("positive", "positive", 0.89),
        ("positive", "positive", math.nan),
        ("negative", "positive", 0.11),
        ("negative", "parsed", 0.84),
        ("positive and formal", "parsed", 0.5),
        ("positive and formal", "formal", 0.6),
        ("positive and formal", "positive", 0.8),
        ("positive", "sentences", 63),
        ("formal", "formal", 0.5),
        ("informal", "parsed", 0.8),
    ],
)
def test_a_missed_target_is_noticed(column: str, field: str, value: float) -> None:
    columns = good_columns()
    columns[column] = replace(columns[column], shares=columns[column].shares._replace(**{field: value}))
    assert not all(check.holds for check in check_all(columns, 96, 96, good_sweep()))


def test_an_unsteered_row_that_differs_is_noticed() -> None:
    assert not all(check.holds for check in check_all(good_columns(), 96, 95, good_sweep()))


@pytest.mark.parametrize(
    ("feature", "words"), [("sentiment", ("Praise", "Complaint")), ("formality", ("Formal", "Casual"))]
)
def test_contrasting_prompts_differ_in_their_header_alone(feature: Feature, words: tuple[str, str]) -> None:
    said = {"Praise", "Complaint", "Formal", "Casual"}
    wanted, opposite = contrasting_prompts(feature, 24, seed=3)
    assert len(wanted) == len(opposite) == 24
    for one, two in zip(wanted, opposite, strict=True):
        (header, beginning), (other_header, other_beginning) = one.split(": "), two.split(": ")
        assert beginning == other_beginning != ""
        assert header.split()[-1] == other_header.split()[-1]  # the topic
        assert (header.split()[0], other_header.split()[0]) == words
        assert said.isdisjoint(header.split()[1:])
    assert contrasting_prompts(feature, 24, seed=3) == (wanted, opposite)
    assert contrasting_prompts(feature, 24, seed=4) != (wanted, opposite)


def test_sentences_that_were_cut_short_are_not_counted() -> None:
    assert complete_sentences(["The soup was good. The br", "I loved it!"]) == ["The soup was good.", "I loved it!"]


def test_the_demo_keeps_its_promises_and_writes_picture_numbers_and_vectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--output", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["succeeded"]
    columns = result["columns"]
    assert set(columns) == set(COLUMNS)
    assert columns["positive"]["positive"] >= 0.9
    assert columns["negative"]["positive"] <= 0.1
    assert all(column["sentences"] >= 64 for column in columns.values())
    assert (tmp_path / "out" / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result
    for name in ("sentiment", "formality"):
        assert SteeringVector.load(tmp_path / "out" / f"{name}.safetensors").hidden_size == 128


def test_a_demo_that_does_not_steer_says_so_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import trimtab.demo.experiment as experiment

    nothing: Callable[..., object] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(experiment.Vectors, "spec", nothing)
    monkeypatch.setattr(experiment, "SWEEP", (-1.0, 0.0, 1.0))
    monkeypatch.setattr(experiment, "COPIES", 2)
    monkeypatch.setattr(experiment, "SWEEP_COPIES", 1)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "MISSED" in printed.out
    assert "positive: at least 90 % positive" in printed.err.splitlines()[-1]
