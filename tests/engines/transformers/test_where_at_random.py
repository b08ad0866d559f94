"""Random `where`s, a batch of prompts at a time: each token receives what the slow model of `where` says."""

from typing import Any

import pytest
import torch
from families import FAMILIES

import where_model
from test_where_model import TAGS, FakeTokenizer, cases
from trimtab.engines.transformers import SteeredModel
from trimtab.engines.transformers.arguments import Reader
from trimtab.errors import SteeringError
from trimtab.spec import Steering

ROWS, ANSWER, LARGE = 40, 20, 1000.0


def spec(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Intervention i adds to number i of the stream."""
    added = [{"post_block": {"0": [LARGE * (place == index) for place in range(32)]}} for index in range(len(steps))]
    return {
        "interventions": [{"kind": "add", "vector": vector, **one} for vector, one in zip(added, steps, strict=True)]
    }


def served(steered: SteeredModel, seed: int) -> list[tuple[list[dict[str, Any]], where_model.Conversation]]:
    """Random requests that are not refused, each with an answer of `ANSWER` tokens."""
    found = []
    for steps, told, prompt in cases(seed, 4 * ROWS):
        told.answer = ([*told.answer, *told.prompt[::-1], 1, 2, 3] * ANSWER)[:ANSWER]
        try:
            Steering.parse(spec(steps)).resolve({}, steered.sites, {}).placed(prompt)
        except SteeringError:
            continue
        if not told.thinks:
            found.append((steps, told))
    assert len(found) > ROWS
    return found[:ROWS]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_every_token_of_a_batch_receives_what_the_slow_model_says(options: dict[str, Any]) -> None:
    built = FAMILIES["llama"].model()
    left: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    with SteeredModel(built) as steered:
        steered._reader = Reader(FakeTokenizer(), TAGS, 96)
        rows = served(steered, seed=len(str(options)))
        width = max(len(told.prompt) for _, told in rows)
        built.model.layers[0].register_forward_hook(lambda _m, _args, output: left.append(output.clone()))
        built.model.layers[1].register_forward_pre_hook(
            lambda _m, args, kwargs: added.append((args[0] if args else kwargs["hidden_states"]) - left.pop()),
            with_kwargs=True,
        )
        out = steered.generate(
            [list(told.prompt) for _, told in rows],
            [spec(steps) for steps, _ in rows],
            max_new_tokens=ANSWER,
            prefix_allowed_tokens_fn=lambda row, ids: [rows[row][1].answer[len(ids) - width]],
            **options,
        )
    whole = added[-1] if options.get("use_cache") is False else torch.cat(added, dim=1)
    for (steps, told), here, one in zip(rows, whole, out, strict=True):
        expected = where_model.acting(steps, told)[:-1]
        tokens = here[width - len(told.prompt) :]
        assert [{*(token > LARGE / 2).nonzero().flatten().tolist()} for token in tokens] == expected, (steps, told)
        counts = [sum(index in some for some in expected) for index in range(len(steps))]
        assert [use.tokens for use in one.receipt.interventions] == counts
