"""`where` under each way of generating: greedy answers, samples, beams, guesses, rows that end early, other devices."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_where import FORCED, ROWS, STEPS, Asked, Said, answered, assert_as_hooked, last_of, seeing, specs
from where_oracle import Hooked

from trimtab.engines.transformers import SteeredModel, model
from trimtab.errors import SteeringError

LLAMA = FAMILIES["llama"]
PROMPT = [5, 17, 3, 44, 9]
ODD = tuple(range(1, 96, 2))


def by_tokens(first: int) -> list[Asked]:
    """What the answer's own tokens decide: its odd tokens, and those behind `first`."""
    return [
        Asked({"answer": "all", "tokens": list(ODD)}, answered(lambda i, ids, n: ids[i] % 2 == 1)),
        Asked({"after": [first]}, answered(lambda i, ids, n: first in ids[n:i] and ids[i] != first), "ablate", 1),
    ]


def hooked(acts: Sequence[Asked], prompt: Sequence[int]) -> Hooked:
    built = LLAMA.model()
    return Hooked(built, built.model.layers, [asked.act() for asked in acts], len(prompt))


def first_token(prompt: Sequence[int]) -> int:
    return hooked([], prompt).greedy(prompt, 1)[0]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
def test_greedy_answers_are_those_of_whole_sequences_with_hooks(options: dict[str, Any]) -> None:
    prompts = [PROMPT, [7, 8], [60, 2, 33, 21, 80, 6, 11]]
    rows = [(prompt, by_tokens(first_token(prompt))) for prompt in prompts]
    expected = [hooked(acts, prompt).greedy(prompt, STEPS) for prompt, acts in rows]
    with SteeredModel(LLAMA.model()) as steered:
        out = steered.generate(prompts, specs(rows), max_new_tokens=STEPS, do_sample=False, **options)
        plain = steered.generate(prompts, max_new_tokens=STEPS, do_sample=False)
    assert [one.token_ids for one in out] == expected
    assert [one.token_ids for one in plain] != expected
    for (prompt, acts), one in zip(rows, out, strict=True):
        ids = [*prompt, *one.token_ids[:-1]]
        counts = [sum(asked.says(place, ids, len(prompt)) for place in range(len(ids))) for asked in acts]
        assert [use.tokens for use in one.receipt.interventions] == counts
        assert any(counts)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}], ids=str)
def test_beams_that_change_places_keep_what_their_own_tokens_decide(options: dict[str, Any]) -> None:
    how = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": STEPS, "do_sample": False}
    prompts = [PROMPT, [7, 8]]
    rows = [(prompt, by_tokens(first_token(prompt))) for prompt in prompts]
    expected = [answer for prompt, acts in rows for answer in hooked(acts, prompt).generate(prompt, **how)]
    built = LLAMA.model()
    before = dict(vars(built))
    with SteeredModel(built) as steered:
        out = steered.generate(prompts, specs(rows), **how, **options)
        assert vars(built).keys() == before.keys()
    assert [one.token_ids for one in out] == expected


def test_samples_of_a_prompt_are_decided_each_by_its_own_tokens() -> None:
    how = {"num_return_sequences": 3, "max_new_tokens": STEPS, "do_sample": True, "temperature": 1.5}
    acts = by_tokens(first_token(PROMPT))
    torch.manual_seed(5)
    expected = hooked(acts, PROMPT).generate(PROMPT, **how)
    with SteeredModel(LLAMA.model()) as steered:
        torch.manual_seed(5)
        out = steered.generate([PROMPT], specs([(PROMPT, acts)]), **how)
    assert [one.token_ids for one in out] == expected
    assert len({tuple(answer) for answer in expected}) == 3


class Liked:
    """Has the one row of a call choose given tokens, and forbids no others: then guesses may be wrong."""

    def __init__(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        self.width, self.answer = len(prompt), answer

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        if ids.shape[1] - self.width < len(self.answer):
            scores[0, self.answer[ids.shape[1] - self.width]] += 1e4
        return scores


THINKING = Asked(
    {"section": {"name": "thinking", "start": [40], "end": [42]}},
    answered(lambda i, ids, n: last_of((40, 42), ids[:i]) == 40 and ids[i] not in (40, 42)),
)
SHORT_GUESSES = [*FORCED[0][:4], 40, 41, 55, 3, *FORCED[0][4:7], 42, *range(43, 90), *FORCED[0][:2]]
LONG_GUESSES = [3, 40, 41, 55, 42, *range(43, 95), *range(1, 40), 9]


@pytest.mark.parametrize(
    ("guesses", "prompt", "answer"),
    [
        (2, SHORT_GUESSES, FORCED[0]),
        (5, SHORT_GUESSES, FORCED[0]),
        (90, LONG_GUESSES, [40, 41, 55, *[50, 51] * 50]),  # as wrong as long: 42, and 89 that are not thought
    ],
)
def test_guesses_that_are_taken_back_decide_nothing(guesses: int, prompt: list[int], answer: list[int]) -> None:
    """The prompt holds something like the answer's beginning, so that guesses are made."""
    within = Asked({"answer": [[0, 3]], "not": {"tokens": [41]}}, lambda i, ids, n: 0 <= i - n < 3 and ids[i] != 41)
    rows = [(prompt, [THINKING, within._replace(layer=1)])]
    built = LLAMA.model(max_position_embeddings=256)
    with SteeredModel(built) as steered, seeing(built, built.model.layers) as seen:
        (out,) = steered.generate(
            [prompt],
            specs(rows),
            max_new_tokens=len(answer),
            do_sample=False,
            prompt_lookup_num_tokens=guesses,
            logits_processor=[Liked(prompt, answer)],
        )
    assert out.token_ids[: len(answer)] == answer
    assert max(seen.passes()[1:]) == guesses + 1
    assert len(prompt) + len(answer) < sum(seen.passes())  # some were wrong
    assert_as_hooked("llama", rows, [answer], seen())


def test_a_row_that_ends_leaves_the_others_as_they_are() -> None:
    """Pads of a row that is over are nobody's tokens, though they are the very ones that others wait for."""
    rows = [(prompt, acts) for prompt, acts in ROWS if acts]
    said = Said(rows)
    said.answers = [answer[:3] + [90] * 7 if row % 2 else answer for row, answer in enumerate(said.answers)]
    built = LLAMA.model()
    with SteeredModel(built) as steered, seeing(built, built.model.layers) as seen:
        out = steered.generate(
            [prompt for prompt, _ in rows],
            specs(rows),
            max_new_tokens=STEPS,
            eos_token_id=90,
            pad_token_id=40,
            prefix_allowed_tokens_fn=said,
        )
    assert [one.token_ids for one in out] == [
        answer[: 4 if row % 2 else STEPS] for row, answer in enumerate(said.answers)
    ]
    assert_as_hooked("llama", rows, [one.token_ids for one in out], seen())
    for (prompt, acts), one in zip(rows, out, strict=True):
        ids = [*prompt, *one.token_ids[:-1]]
        counts = [sum(asked.says(place, ids, len(prompt)) for place in range(len(ids))) for asked in acts]
        assert [use.tokens for use in one.receipt.interventions] == counts
        measured = [use.corrections.measured for use in one.receipt.interventions if use.corrections is not None]
        assert measured == [
            count for asked, count in zip(acts, counts, strict=True) if asked.kind in ("ablate", "clamp")
        ]


def test_layers_on_several_devices_are_steered_at_the_same_tokens(monkeypatch: Any) -> None:
    one, other = torch.device("cpu"), torch.device("cpu:0")  # one device under two names
    prompts, how = [prompt for prompt, _ in ROWS], {"max_new_tokens": STEPS, "prefix_allowed_tokens_fn": Said(ROWS)}
    with SteeredModel(LLAMA.model()) as steered:
        expected = steered.generate(prompts, specs(ROWS), output_logits=True, **how)
    monkeypatch.setattr(model, "layer_devices", lambda _: {0: one, 1: other, 2: other})
    with SteeredModel(LLAMA.model()) as steered:
        out = steered.generate(prompts, specs(ROWS), output_logits=True, **how)
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
        assert ours.receipt.interventions == theirs.receipt.interventions


def test_a_model_whose_embedding_is_given_no_ids_is_refused_only_where_they_decide() -> None:
    built = LLAMA.model()
    embedding, forward = built.model.embed_tokens, built.model.forward

    def without(input_ids: Any, **rest: Any) -> Any:
        embedded = torch.nn.functional.embedding(input_ids, embedding.weight)
        return forward(**{**rest, "inputs_embeds": embedded})

    with SteeredModel(built) as steered:
        built.model.forward = without
        for where in ({"answer": [[0, 2]]}, {"prompt": "all", "tokens": [5]}):
            asked = Asked(where, lambda i, ids, n: False)
            assert steered.generate([PROMPT], specs([(PROMPT, [asked])]), max_new_tokens=3)[0].receipt.sites
        with pytest.raises(SteeringError, match="model: its input embedding was not given the 1 x 5 token ids"):
            steered.generate([PROMPT], specs([(PROMPT, by_tokens(40))]), max_new_tokens=3)
