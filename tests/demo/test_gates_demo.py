"""The demonstration's third part keeps its promises, says what it measured, and shows the gate of each token."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from trimtab.demo import model_path
from trimtab.demo.gates import PROMPTS, GatesResult, beginnings, coloured, run_gates, show_gates
from trimtab.demo.grammar import read_sentence, split_sentences
from trimtab.engines.transformers import SteeredModel
from trimtab.vectors import Probe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    with SteeredModel.from_pretrained(model_path()) as model:
        return run_gates(model, folder, 0), folder


def test_positive_text_is_left_alone_and_negative_text_is_turned(made):
    result, _ = made
    assert [check.promise for check in result.checks if not check.holds] == []
    assert result.left_alone >= 0.9
    assert result.shares["unsteered"].positive < 0.2
    assert result.shares["gated"].positive > 0.7


def test_the_shown_gates_are_those_that_acted(made):
    result, _ = made
    for row in result.rows:
        opened = any(score > 0 for score in row.scores[:-1])
        assert row.untouched or opened  # whatever was changed has a token on which the gate opened
    negative = [row for row in result.rows if row.sentiment == "negative"]
    assert sum(any(score > 0 for score in row.scores) for row in negative) > PROMPTS / 2


def test_the_probe_is_written_and_was_trained_on_other_texts(made):
    result, folder = made
    assert Probe.load(folder / "probe.safetensors") == result.report.probe
    for kind in ("positive", "negative"):
        assert not set(beginnings(kind, 400, "training 0", sentences=2)) & {row.prompt for row in result.rows}
        assert len(set(beginnings(kind, 50, "x"))) == 50


def test_beginnings_never_have_the_other_sentiment():
    for kind, other in (("positive", "negative"), ("negative", "positive")):
        readings = [
            read_sentence(sentence).sentiment
            for text in beginnings(kind, 40, "y")
            for sentence in split_sentences(text.split(":", 1)[1].strip())
        ]
        assert other not in readings
        assert readings.count(kind) > 20  # the rest can be read either way


def test_the_page_holds_every_token_with_its_gate_and_nothing_from_elsewhere(made):
    result, folder = made
    page = (folder / "gates.html").read_text(encoding="utf-8")
    steered = page.count('<span class="steered" title=')
    assert steered == sum(score > 0 for row in result.rows for score in row.scores)
    assert len(re.findall(r"<span[^>]*title=", page)) == sum(len(row.tokens) for row in result.rows)
    assert "http" not in page


def test_the_terminal_marks_the_tokens_that_were_steered(made):
    result, _ = made
    text = coloured(("a", "b", "c"), (-1.0, 0.5, -0.1))
    assert [(span.start, span.end) for span in text.spans if span.style] == [(1, 2)]
    console = Console(width=120, record=True)
    show_gates(result, console)
    shown = console.export_text()
    assert "negative beginnings" in shown
    assert f"{result.report.auroc.value:.3f}" in shown


@pytest.mark.parametrize(("name", "value"), [("gated", 0.4), ("gated", math.nan)])
def test_a_missed_promise_is_noticed(made, name, value):
    result, _ = made
    shares = {**result.shares, name: result.shares[name]._replace(positive=value)}
    assert not all(check.holds for check in replace(result, shares=shares).checks)
    touched = [replace(row, untouched=False) if row.sentiment == "positive" else row for row in result.rows]
    worse = GatesResult(result.report, result.operating, touched, result.shares)
    assert not worse.checks[0].holds
    assert np.isfinite(worse.effect)
