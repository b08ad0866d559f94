"""The demonstration's fourth part: a direction that is read before it is written, beside one that is only added.

The prompts say by their header whether praise or a complaint follows. Adding the sentiment vector pushes both alike.
Taking its direction out of the stream takes away what the header says. A floor under its projection lifts complaints
to where praise is, and leaves praise as it is.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table

from trimtab.demo.contrast import contrasting_prompts
from trimtab.demo.experiment import PAIRS, STRENGTH, complete_sentences, sample
from trimtab.demo.grammar import SENTIMENTS, Shares, measure, telling_header
from trimtab.demo.reviews import TOPICS
from trimtab.demo.targets import Check
from trimtab.engines.transformers import SteeredModel
from trimtab.sites import HookPoint, Site
from trimtab.training.extraction import extract_vector

SITE = Site(1, HookPoint.POST_BLOCK)  # where the direction is found and the floor is held
WRITERS = ["pre_attn", "post_attn", "post_block"]  # of every layer: all that is written into the stream passes there
COPIES = 6  # of each header


@dataclass(frozen=True)
class DirectionsResult:
    """What the grammar makes of the answers: `shares[spec][sentiment of the header]`, and the floor of the clamp."""

    shares: dict[str, dict[str, Shares]]
    floor: float  # in units of the stream

    def hold(self, spec: str) -> float:
        """How far the header decides: the share of positive sentences under praise, less that under complaints."""
        return self.shares[spec]["positive"].positive - self.shares[spec]["negative"].positive

    @property
    def checks(self) -> list[Check]:
        """What this part promises."""
        before, ablated, clamped = self.hold("unsteered"), self.hold("ablate"), self.shares["clamp"]
        lifted, kept = clamped["negative"].positive, clamped["positive"].positive
        parsed = min(self.shares[spec][each].parsed for spec in ("ablate", "clamp") for each in SENTIMENTS)
        return [
            Check(
                "ablated: headers decide at most half as much of the sentiment as before",
                f"{100 * ablated:.0f} of {100 * before:.0f} points",
                before > 0.5 and ablated <= 0.5 * before,
            ),
            Check("clamped: at least 75 % positive under headers of complaints", f"{lifted:.1%}", lifted >= 0.75),
            Check("... and at least 90 % under headers of praise", f"{kept:.1%}", kept >= 0.9),
            Check("at least 65 % of ablated and clamped sentences parse", f"{parsed:.1%}", parsed >= 0.65),
        ]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for a script."""
        shares = {spec: {name: one._asdict() for name, one in by.items()} for spec, by in self.shares.items()}
        return {"shares": shares, "floor": self.floor, "hold": {spec: self.hold(spec) for spec in self.shares}}


def run_directions(model: SteeredModel, seed: int) -> DirectionsResult:
    """Find the direction and its floor, and sample all prompts under all specs in one batch."""
    positive, negative = contrasting_prompts("sentiment", PAIRS, seed)
    vector = extract_vector(model, positive, negative, layers=[SITE.layer], token="last", progress=False)
    along = vector.directions[SITE] / np.linalg.norm(vector.directions[SITE])
    floor = float(np.mean([one[SITE][-1] @ along for one in model.activations(positive, [SITE])]))
    layers = list(range(model.sites.num_layers))
    specs: dict[str, Any] = {
        "unsteered": None,
        "add": {"kind": "add", "vector": vector, "scale": STRENGTH["sentiment"]},
        "ablate": {"kind": "ablate", "vector": vector, "layers": layers, "hooks": WRITERS},
        "clamp": {"kind": "clamp", "vector": vector, "min": floor},
    }
    prompts = [telling_header(topic, sentiment=each) for each in SENTIMENTS for topic in TOPICS * COPIES]
    steering = [spec and {"interventions": [spec]} for spec in specs.values()]
    outputs = sample(model, prompts * len(specs), [spec for spec in steering for _ in prompts], seed)
    texts = [output.text for output in outputs]
    shares: dict[str, dict[str, Shares]] = {}
    some = len(prompts) // len(SENTIMENTS)
    for number, name in enumerate(specs):
        parts = [
            texts[start : start + some] for start in range(number * len(prompts), (number + 1) * len(prompts), some)
        ]
        shares[name] = {each: measure(complete_sentences(part)) for each, part in zip(SENTIMENTS, parts, strict=True)}
    return DirectionsResult(shares, floor)


def show_directions(result: DirectionsResult, console: Console) -> None:
    """The result for a person: positive sentences under either kind of header, for each kind of intervention."""
    console.print(Rule("a direction that is read: taken out, or held above a floor", style="dim"))
    table = Table(box=SIMPLE_HEAD)
    for heading in ("positive sentences, %", "under complaint", "under praise", "header decides", "parsed, %"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, by in result.shares.items():
        parsed = min(one.parsed for one in by.values())
        cells = (by["negative"].positive, by["positive"].positive, result.hold(name), parsed)
        table.add_row(name, *(f"{100 * cell:.0f}" for cell in cells))
    console.print(table)
    console.print(f"the floor is {result.floor:.0f}, the mean projection of positive text at {SITE}")
