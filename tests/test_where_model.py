"""What `where` is resolved to is what a slow model of it says, token by token."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

import where_model
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.spec import Steering
from trimtab.spec.prompt_tokens import PromptTokens, Tags
from trimtab.spec.unplaced import Unplaced
from trimtab.vectors import SteeringVector
from where_model import Conversation

HERE = Site(0, HookPoint.POST_BLOCK)
SITES = ModelSites(8, 1, frozenset({HERE}))
VECTORS = {f"v{index}": SteeringVector({HERE: np.eye(8, dtype=np.float32)[index]}) for index in range(8)}

FEW = 5  # different ids: so that sequences are often complete
SPECIAL = frozenset({0, 4})
TAGS = Tags(((1, 2), (3,)), ((2, 1),), opens=False)


class FakeTokenizer:
    """As much of a tokenizer as special tokens need."""

    def __init__(self) -> None:
        self.all_special_ids = [0]
        self.added_tokens_decoder = {4: AddedToken("d", special=True), 3: AddedToken("c", special=False)}


def unplaced(interventions: Sequence[dict[str, Any]]) -> Unplaced:
    steps = [{"kind": "add", "vector": f"v{index}", **one} for index, one in enumerate(interventions)]
    found = Steering.parse({"interventions": steps}).resolve(VECTORS, SITES)
    assert isinstance(found, Unplaced)
    return found


def acting(steering: ResolvedSteering, tokens: Sequence[int]) -> list[set[int]]:
    """Which interventions act on each token, as the programs of the spans say."""
    assert steering.spans is not None
    asked = [{index for term in program.all_terms for index in term.asked_by} for program in steering.programs]
    return [asked[place] for place in steering.spans.decided(tokens)]


def some_range(rng: random.Random, least: int, most: int) -> list[int | None]:
    while True:
        first, stop = (rng.choice([None, *range(least, most + 1)]) for _ in range(2))
        same_side = first is not None and stop is not None and (first < 0) == (stop < 0)
        if stop != 0 and not (same_side and first >= stop):  # type: ignore[operator]
            return [first, stop]


def sequence(rng: random.Random) -> list[int]:
    return [rng.randrange(FEW) for _ in range(rng.choice([1, 1, 2, 3]))]


def selection(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rng.random() < 0.5:
        found["answer"] = rng.choice(["all", [some_range(rng, 0, 9) for _ in range(rng.randint(1, 3))]])
    if rng.random() < 0.4:
        found["prompt"] = rng.choice(["all", [some_range(rng, -9, 9) for _ in range(rng.randint(1, 3))]])
    else:
        if rng.random() < 0.2:
            name = rng.choice(["thinking", "response"])
            start, end = sequence(rng), sequence(rng)
            own = {"name": name, "start": start, "end": end}
            found["section"] = name if rng.random() < 0.6 or start == end else own
        if rng.random() < 0.2:
            found["after"] = sequence(rng)
        if rng.random() < 0.2:
            found["until"] = sequence(rng)
    if rng.random() < 0.25:
        found["tokens"] = [rng.randrange(FEW) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.2:
        found["special_tokens"] = rng.random() < 0.4
    return found


def intervention(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.15:
        return {"phase": rng.choice(["all", "prefill", "decode"])}
    where = selection(rng)
    if rng.random() < 0.4:
        where["not"] = selection(rng)
    return {"where": where}


def cases(seed: int, count: int) -> Iterator[tuple[list[dict[str, Any]], Conversation, PromptTokens]]:
    rng = random.Random(seed)
    for _ in range(count):
        prompt = [rng.randrange(FEW) for _ in range(rng.randint(1, 12))]
        answer = [rng.randrange(FEW) for _ in range(rng.randint(0, 24))]
        tags = TAGS._replace(opens=rng.random() < 0.5)
        told = Conversation(
            prompt,
            answer,
            special=SPECIAL,
            starts=tags.starts,
            ends=tags.ends,
            thinks=tags.opens,  # type: ignore[arg-type]
        )
        steps = [intervention(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        if not any("where" in step for step in steps):
            steps[0] = {"where": selection(rng)}
        yield steps, told, PromptTokens(len(prompt), prompt, FakeTokenizer(), tags=tags)


@pytest.mark.parametrize("seed", range(2))
def test_tokens_receive_what_the_slow_model_says(seed: int) -> None:
    served = 0
    for steps, told, prompt in cases(seed, 1000):
        try:
            steering = unplaced(steps).placed(prompt)
        except SteeringError as error:
            check_refusal(error, steps, told)
            continue
        served += 1
        assert acting(steering, told.tokens) == where_model.acting(steps, told), (steps, told)
        check_where_told(steering, steps, told)
    assert served > 700


def check_refusal(error: SteeringError, steps: Sequence[dict[str, Any]], told: Conversation) -> None:
    """Nothing is refused that is not empty, or needs more than engines hold."""
    if "at most" in error.message or "tag ends with the other" in error.message:
        return
    assert "nothing" in error.message, (error, steps, told)
    index = int(error.field.removeprefix("interventions[").partition("]")[0])
    rng = random.Random(0)
    for _ in range(20):
        assert not any(where_model.selected(where_model.where_of(steps[index]), told)), (error, steps, told)
        told = replace(told, answer=[rng.randrange(FEW) for _ in range(24)])


def check_where_told(steering: ResolvedSteering, steps: Sequence[dict[str, Any]], told: Conversation) -> None:
    """Receipts name the very tokens, or, where the answer decides, no fewer."""
    size = len(told.prompt)
    for step, asked in zip(steps, steering.asked, strict=True):
        assert asked.where is not None
        chosen = where_model.selected(where_model.where_of(step), told)
        prompt = [any(first <= at < stop for first, stop in asked.where.prompt) for at in range(size)]
        answer = [
            any(first <= at and (stop is None or at < stop) for first, stop in asked.where.answer)
            for at in range(len(told.answer))
        ]
        assert prompt == chosen[:size], (step, told)
        if asked.where.by_tokens:
            assert all(named or not chosen for named, chosen in zip(answer, chosen[size:], strict=True)), (step, told)
        else:
            assert answer == chosen[size:], (step, told)
