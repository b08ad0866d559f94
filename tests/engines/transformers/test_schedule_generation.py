"""`schedule` in this engine, against whole sequences without a cache and a plain hook for each place of an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_where import PROBE, STEPS, UNIT, Said, V, at, built, seeing, specs
from where_oracle import Act, Hooked

from trimtab.engines.transformers import SteeredModel

FADING, RISING, LATE = {"decay": 0.7}, {"ramp": [0, 6]}, {"ramp": [3, 5]}
GATE = {"probe": at(0, PROBE), "threshold": 0.1}

# Of each kind of intervention what a request says, and what a token becomes at a strength.
KINDS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "add": ({"kind": "add"}, lambda x, s: x + s * V.double()),
    "gated": (
        {"kind": "add", "gate": GATE},
        lambda x, s: x + s * torch.sigmoid(x @ PROBE.double() - 0.1) * V.double(),
    ),
    "ablate": ({"kind": "ablate"}, lambda x, s: x - s * (x @ UNIT) * UNIT),
    "clamp": ({"kind": "clamp", "value": 30.0}, lambda x, s: x + s * (30.0 - x @ UNIT) * UNIT),
}


def factor(schedule: dict[str, Any] | None, place: int) -> float:
    """That of a token of the answer; places below 0 are the prompt's."""
    if schedule is None or place < 0:
        return 1.0
    if "decay" in schedule:
        return float(schedule["decay"] ** place)
    first, end = schedule["ramp"]
    return float(min(max((place - first + 1) / (end - first), 0.0), 1.0))


@dataclass
class Timed:
    """An intervention behind layer 0 on all tokens, or on some of the answer."""

    kind: str
    schedule: dict[str, Any] | None = None
    answer: tuple[int, int] | None = None

    def spec(self) -> dict[str, Any]:
        where = {} if self.answer is None else {"where": {"answer": [list(self.answer)]}}
        schedule = {} if self.schedule is None else {"schedule": self.schedule}
        return KINDS[self.kind][0] | {"vector": at(0, V)} | where | schedule

    def acts(self) -> list[Act]:
        first, end = (-99, STEPS) if self.answer is None else self.answer
        return [self._act(place) for place in range(first, end)]

    def _act(self, place: int) -> Act:
        change, strength = KINDS[self.kind][1], factor(self.schedule, place)
        return Act(0, lambda x: change(x, strength), lambda ids, n: [i == n + place for i in range(len(ids))])


class Monitored(Timed):
    """One that adds, as a monitor lets through what of it is done to the answer."""

    def _act(self, place: int) -> Act:
        act = super()._act(place)
        if place < 0:
            return act
        strength = factor(self.schedule, place)
        return Act(0, lambda x: KINDS["gated"][1](x, strength), act.touched)


ROWS: list[tuple[list[int], list[Timed]]] = [
    ([5, 17, 3, 44, 9], [Timed("add", FADING)]),
    ([7, 8], [Timed("add", LATE, (1, 9))]),
    ([12, 13, 14], [Timed("add", RISING), Timed("add", FADING), Timed("add", None, (4, 8))]),
    ([60, 2, 33, 21], [Timed("gated", FADING), Timed("add", RISING, (0, 3))]),
    ([40], [Timed("ablate", RISING)]),
    ([9, 9, 4], [Timed("add", RISING, (0, 7)), Timed("clamp", LATE)]),
    ([11, 12], []),
]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
def test_each_token_of_an_answer_is_steered_at_the_strength_of_its_place(options: dict[str, Any]) -> None:
    model, layers = built("llama")
    said = Said(ROWS)
    with SteeredModel(model) as steered, seeing(model, layers) as seen:
        how = {"max_new_tokens": STEPS, "prefix_allowed_tokens_fn": said} | options
        out = steered.generate([prompt for prompt, _ in ROWS], specs(ROWS), **how)
        hidden = seen()
    assert [one.token_ids for one in out] == said.answers
    assert_as_hooked(ROWS, hidden)


def test_before_a_monitor_what_fades_goes_on_fading() -> None:
    """It reads behind layer 0, where the interventions act, and leaves prompts alone."""
    rows = [(prompt, [Timed("add", steps[0].schedule if steps else RISING)]) for prompt, steps in ROWS]
    model, layers = built("llama")
    said = Said(rows)
    with SteeredModel(model, monitor=GATE) as steered, seeing(model, layers) as seen:
        out = steered.generate(
            [prompt for prompt, _ in rows], specs(rows), max_new_tokens=STEPS, prefix_allowed_tokens_fn=said
        )
        hidden = seen()
    assert all(one.receipt.monitor for one in out)
    assert_as_hooked([(prompt, [Monitored(**vars(step)) for step in steps]) for prompt, steps in rows], hidden)


def assert_as_hooked(rows: Sequence[tuple[list[int], list[Timed]]], hidden: torch.Tensor) -> None:
    width = max(len(prompt) for prompt, _ in rows)
    for row, ((prompt, steps), answer) in enumerate(zip(rows, Said(rows).answers, strict=True)):
        plain, inner = built("llama")
        hooked = Hooked(plain, inner, [act for step in steps for act in step.acts()], len(prompt))
        hooked.run([*prompt, *answer[:-1]])
        ours = hidden[row, width - len(prompt) : width + len(answer) - 1]
        torch.testing.assert_close(ours, hooked.seen[0], atol=3e-4, rtol=3e-4, msg=lambda m, row=row: f"row {row}: {m}")
