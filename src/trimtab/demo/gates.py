"""The demonstration's third part: a sentiment probe trained on the spot, and a vector that acts only where it fires.

The probe fires on negative text, and the vector that it lets through is the positive one. So in one batch of negative
and positive beginnings the negative ones are turned around, and the positive ones are left alone: by the gate, token by
token, under one and the same spec.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from trimtab.demo.contrast import contrasting_prompts
from trimtab.demo.experiment import PAIRS, complete_sentences
from trimtab.demo.gates_page import write_page
from trimtab.demo.grammar import FORMALITIES, Shares, headers, measure, sample_review
from trimtab.demo.reviews import TOPICS
from trimtab.demo.targets import Check
from trimtab.engines.transformers import SteeredModel
from trimtab.training.extraction import extract_vector
from trimtab.training.probes import Operating, ProbeReport, train_probe

TRAINED_ON = 400  # texts of either sentiment
RATE = 0.2  # of the positive texts may have a token steered by mistake: promised with 95 % confidence
LAYERS = (1,)  # of the four: late enough for the sentiment to show, early enough for the rest of the model to follow
ALWAYS, GATED = 0.8, 1.2  # strengths, in mean differences; the gated vector meets few tokens and may push each harder
PROMPTS = 48  # of either sentiment
TOKENS = 32


@dataclass(frozen=True)
class Row:
    """One prompt, what came of it unsteered, steered on every token, and gated, and the gate of each gated token."""

    sentiment: str
    prompt: str
    unsteered: str
    always: str
    gated: str
    tokens: tuple[str, ...]  # of prompt and gated answer
    scores: tuple[float, ...]  # of the probe, less the threshold
    untouched: bool  # the gated answer is the unsteered one, token by token


@dataclass(frozen=True)
class GatesResult:
    """What was trained, generated and measured."""

    report: ProbeReport
    operating: Operating
    rows: list[Row]
    shares: dict[str, Shares]  # of the continuations of negative prompts

    @property
    def left_alone(self) -> float:
        """The share of positive prompts whose gated answer is the unsteered one."""
        return float(np.mean([row.untouched for row in self.rows if row.sentiment == "positive"]))

    @property
    def effect(self) -> float:
        """How far the gated vector moves negative prompts towards positive, as a share of what always-on does."""
        base, always, gated = (self.shares[name].positive for name in ("unsteered", "always", "gated"))
        return (gated - base) / (always - base) if always > base else 0.0

    @property
    def checks(self) -> list[Check]:
        """What this part promises."""
        alone, effect = self.left_alone, self.effect
        return [
            Check(
                "gated: at least 90 % of the positive prompts keep their unsteered text", f"{alone:.1%}", alone >= 0.9
            ),
            Check("... and negative ones get at least 80 % of the always-on effect", f"{effect:.0%}", effect >= 0.8),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for a script."""
        return {
            "probe": self.report.as_json(),
            "threshold": self.operating.threshold,
            "left_alone": self.left_alone,
            "effect": self.effect,
            "negative_prompts": {name: shares._asdict() for name, shares in self.shares.items()},
        }


def run_gates(model: SteeredModel, output: Path, seed: int) -> GatesResult:
    """Train the probe, run the batch three times, measure; writes `probe.safetensors` and `gates.html` to `output`."""
    torch.manual_seed(seed)
    report = train_probe(
        model,
        beginnings("negative", TRAINED_ON, f"training {seed}", sentences=2),
        beginnings("positive", TRAINED_ON, f"training {seed}", sentences=2),
        layers=LAYERS,
        rates=[RATE],
        seed=seed,
    )
    report.probe.save(output / "probe.safetensors")
    operating = next(one for one in report.thresholds if one.unit == "text")
    site = report.probe.site
    vector = extract_vector(
        model, *contrasting_prompts("sentiment", PAIRS, seed), layers=[site.layer], token="last", progress=False
    )
    sentiments = ["positive"] * PROMPTS + ["negative"] * PROMPTS
    prompts = [text for kind in ("positive", "negative") for text in beginnings(kind, PROMPTS, f"prompts {seed}")]
    gate = {"probe": report.probe, "threshold": operating.threshold, "hard": True}
    specs: dict[str, Any] = {
        "unsteered": None,
        "always": {"interventions": [{"kind": "add", "vector": vector, "scale": ALWAYS}]},
        "gated": {"interventions": [{"kind": "add", "vector": vector, "scale": GATED, "gate": gate}]},
    }
    options = {"do_sample": False, "max_new_tokens": TOKENS}
    outputs = {name: model.generate(prompts, spec, **options) for name, spec in specs.items()}
    rows, special = [], set(model.tokenizer.all_special_ids)
    for index, (sentiment, prompt) in enumerate(zip(sentiments, prompts, strict=True)):
        unsteered, always, gated = (outputs[name][index] for name in specs)
        ids = [*model.tokenizer(prompt)["input_ids"], *gated.token_ids]
        # No steering reaches the probe's site, so the scores of the finished text are those that the gate saw.
        (activations,) = model.activations([ids], [site])
        scores = activations[site] @ report.probe.direction + report.probe.bias - operating.threshold
        rows.append(
            Row(
                sentiment,
                prompt,
                unsteered.text,
                always.text,
                gated.text,
                tuple("" if token in special else model.tokenizer.decode([token]) for token in ids),
                tuple(float(score) for score in scores),
                gated.token_ids == unsteered.token_ids,
            )
        )
    shares = {name: measure(complete_sentences([one.text for one in outputs[name][PROMPTS:]])) for name in specs}
    result = GatesResult(report, operating, rows, shares)
    write_page(result.rows, output / "gates.html")
    return result


def beginnings(sentiment: str, count: int, seed: str, *, sentences: int = 1) -> list[str]:
    """Different beginnings of reviews of one sentiment, under headers that do not tell it."""
    rng = random.Random(f"{sentiment} {seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        topic = rng.choice(TOPICS)
        review = sample_review(
            rng,
            topic=topic,
            sentiment=sentiment,
            formality=FORMALITIES[len(found) % 2],
            sentences=sentences,
            header=headers([topic])[0],
        )
        found[review.text] = None
    return list(found)


def show_gates(result: GatesResult, console: Console, shown: int = 3) -> None:
    """The result for a person: gated texts with each token in the colour of its gate, and what was measured."""
    console.print(Rule("a vector that acts only where a probe fires", style="dim"))
    report, operating = result.report, result.operating
    console.print(
        f"probe at {report.probe.site}, trained on {sum(report.trained_on)} texts; on {sum(report.reported_on)} others "
        f"AUROC {report.auroc} per token; threshold {operating.threshold:.2f}, above which at most "
        f"{operating.false_positive_rate:.0%} of positive texts have a token ({operating.confidence:.0%} confidence)\n"
    )
    for sentiment in ("negative", "positive"):
        rows = [row for row in result.rows if row.sentiment == sentiment][:shown]
        texts = Table(title=f"{sentiment} beginnings", title_justify="left", box=SIMPLE_HEAD, expand=True)
        texts.add_column("unsteered", ratio=1)
        texts.add_column("gated; steered tokens are marked", ratio=1)
        for row in rows:
            texts.add_row(Text(row.prompt, "dim").append(row.unsteered, "not dim"), coloured(row.tokens, row.scores))
        console.print(texts)
    table = Table(box=SIMPLE_HEAD)
    for heading in ("negative beginnings", "sentences", "positive", "parsed"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, shares in result.shares.items():
        table.add_row(name, str(shares.sentences), f"{shares.positive:.1%}", f"{shares.parsed:.1%}")
    console.print(table)


def coloured(tokens: Sequence[str], scores: Sequence[float]) -> Text:
    """The text with each token that the gate let the vector through to on a coloured ground."""
    text = Text()
    for token, score in zip(tokens, scores, strict=True):
        text.append(token, "black on dark_orange" if score > 0 else "")
    return text
