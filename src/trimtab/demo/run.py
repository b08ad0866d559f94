"""The demonstration from start to end: extract, steer one mixed batch, measure, sweep, draw, check every promise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from trimtab.demo import model_path
from trimtab.demo.experiment import (
    COLUMNS,
    CONFIDENCE,
    SWEEP,
    USEFUL,
    Column,
    SweepPoint,
    column_prompts,
    extract_vectors,
    run_columns,
    run_sweep,
)
from trimtab.demo.grammar import read_sentence, split_sentences
from trimtab.demo.picture import draw
from trimtab.demo.targets import OTHER, Check, check_all, points_of, worst_drift
from trimtab.engines.transformers import SteeredModel

SHOWN_COLUMNS = ("unsteered", "positive", "negative", "positive and formal")
SHOWN = ("Review of the restaurant:", "Review of the film:", "Notes on the phone:")
COLOURS = {"positive": "green", "negative": "red"}


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demonstration measured and wrote."""

    columns: dict[str, Column]
    sweep: list[SweepPoint]
    checks: list[Check]
    picture: Path

    def as_json(self) -> dict[str, Any]:
        """Plain data, for a script."""
        return {
            "columns": {name: _plain(column) for name, column in self.columns.items()},
            "sweep": [{"vector": point.feature, "strength": point.strength, **_plain(point)} for point in self.sweep],
            "checks": [{"promise": c.promise, "measured": c.measured, "holds": c.holds} for c in self.checks],
            "picture": str(self.picture),
        }


def run_demo(output: Path, seed: int, console: Console) -> DemoResult:
    """Run it all, saying what it does; writes `steering.png` and both vectors to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    with console.status("loading the bundled model") as status, SteeredModel.from_pretrained(model_path()) as model:
        status.update("extracting a sentiment and a formality vector from contrasting prompts")
        vectors = extract_vectors(model, seed)
        vectors.sentiment.save(output / "sentiment.safetensors")
        vectors.formality.save(output / "formality.safetensors")
        rows = len(column_prompts())
        status.update(f"generating one batch of {rows * len(COLUMNS)} rows under {len(COLUMNS)} steering specs")
        columns, equal_rows = run_columns(model, vectors, seed)
        status.update("sweeping the strength of both vectors")
        sweep = run_sweep(model, vectors, seed)
        status.update("drawing")
        picture = output / "steering.png"
        draw(sweep, picture)
    checks = check_all(columns, rows, equal_rows, sweep)
    return DemoResult(columns, sweep, checks, picture)


def show(result: DemoResult, console: Console) -> None:
    """The result for a person: texts side by side, measured shares."""
    prompts = column_prompts()
    console.print(Rule(f"one batch, {len(result.columns)} steering specs; here are four", style="dim"))
    colours = [Text(name, colour) for name, colour in COLOURS.items()]
    console.print(Text.assemble("each sentence in the colour of its sentiment: ", Text(", ").join(colours), "\n"))
    for prompt in SHOWN:
        texts = Table(title=prompt, title_justify="left", title_style="bold", box=SIMPLE_HEAD, expand=True)
        for name in SHOWN_COLUMNS:
            texts.add_column(name, ratio=1)
        row = prompts.index(prompt)
        texts.add_row(*(_coloured(result.columns[name].texts[row]) for name in SHOWN_COLUMNS))
        console.print(texts)
    console.print(Rule("what the grammar makes of the sentences", style="dim"))
    shares = Table(box=SIMPLE_HEAD)
    for heading in ("", "sentences", "positive, %", "formal, %", "parsed, %"):
        shares.add_column(heading, justify="right" if heading else "left")
    for name, column in result.columns.items():
        shares.add_row(name, *_cells(column))
    console.print(shares)
    console.print(f"{CONFIDENCE:.0%} intervals, over texts. What each vector does to the share that is not its own:")
    drifts = Table(box=SIMPLE_HEAD)
    for heading in ("vector", "moves", "within", "most at", "by"):
        drifts.add_column(heading)
    for feature, moved in OTHER.items():
        for strongest in (USEFUL, max(SWEEP)):
            drift = worst_drift(result.sweep, feature, strongest)
            drifts.add_row(
                feature, moved, f"\N{PLUS-MINUS SIGN}{strongest:g}", f"{drift.strength:+g}", points_of(drift.moved)
            )
    console.print(drifts)


def show_checks(checks: Sequence[Check], console: Console) -> None:
    """Promises, what was measured, and whether they hold."""
    console.print(Rule("what was promised", style="dim"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in checks:
        mark = Text("holds", "green") if check.holds else Text("MISSED", "bold red")
        table.add_row(mark, Text(check.measured, justify="right"), check.promise)
    console.print(table)


def _cells(column: Column) -> list[str]:
    shares = [(getattr(column.shares, name), column.intervals[name]) for name in ("positive", "formal", "parsed")]
    told = [f"{100 * share:.0f} ({100 * ends.low:.0f} to {100 * ends.high:.0f})" for share, ends in shares]
    return [str(column.shares.sentences), *told]


def _plain(measured: Column | SweepPoint) -> dict[str, Any]:
    ends = {name: [interval.low, interval.high] for name, interval in measured.intervals.items()}
    return {**measured.shares._asdict(), "intervals": ends}


def _coloured(text: str) -> Text:
    """Each sentence in the colour of its sentiment; what the grammar cannot read is struck through."""
    shown = Text()
    for sentence in split_sentences(text):
        if sentence[-1] not in ".!":  # cut short by the token limit, and not counted
            return shown.append("\N{HORIZONTAL ELLIPSIS}", "dim")
        reading = read_sentence(sentence)
        shown.append(sentence, COLOURS.get(reading.sentiment or "", "") if reading.parsed else "strike").append(" ")
    return shown
