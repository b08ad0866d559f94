"""A token's place comes from what a call has fed: models with states of many kinds, against hooks and no cache."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import stateful
import torch
from families import FAMILIES
from transformers import LogitsProcessorList

from trimtab.engines.transformers import SteeredModel
from trimtab.engines.transformers.progress import Progress
from trimtab.engines.transformers.prompts import pad
from trimtab.errors import SteeringError
from trimtab.sites import Phase

PROMPTS = [[5, 6, 7, 8, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11]]
LARGE = 20.0 * torch.randn(32, generator=torch.Generator().manual_seed(3))
STEPS = 6
LAYER = 1
SERVED = [name for name in stateful.CONFIGS if name not in stateful.BROKEN_IN_BATCHES]
CONSISTENT = [name for name in SERVED if name not in stateful.CACHE_IS_NOT_RECOMPUTATION]


def spec(phase: str = "all", scale: float = 1.0) -> dict[str, Any]:
    vector = {"post_block": {str(LAYER): LARGE.tolist()}}
    return {"interventions": [{"kind": "add", "vector": vector, "phase": phase, "scale": scale}]}


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def recomputed(model: Any, prompts: Sequence[Sequence[int]], phase: str) -> list[list[int]]:
    """Greedy tokens with a plain hook on one layer; every step runs whole sequences, so columns are places."""
    ids, mask = padded(prompts)
    width = ids.shape[1]

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for row, prompt in enumerate(prompts):
            if phase in ("all", "prefill"):
                hidden[row, width - len(prompt) : width] += LARGE
            if phase in ("all", "decode"):
                hidden[row, width:] += LARGE
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    takes = inspect.signature(model.forward).parameters
    handle = model.get_decoder().layers[LAYER].register_forward_hook(hook)
    for _ in range(STEPS):
        extra = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if "position_ids" in takes else {}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
    handle.remove()
    return ids[:, width:].tolist()


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "batch"])
@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
@pytest.mark.parametrize("name", CONSISTENT)
def test_a_phase_is_steered_whatever_a_model_keeps_between_passes(name: str, phase: str, prompts: Any) -> None:
    expected = recomputed(stateful.model(name), prompts, phase)
    with SteeredModel(stateful.model(name)) as model:
        out = model.generate(prompts, spec(phase), max_new_tokens=STEPS, do_sample=False)
        assert [one.token_ids for one in out] == expected
        plain = [one.token_ids for one in model.generate(prompts, max_new_tokens=STEPS, do_sample=False)]
    assert plain != expected, "the vector decides nothing: the test would pass without it"
    for prompt, one in zip(prompts, out, strict=True):
        assert one.receipt.steered_tokens[Phase.PREFILL] == (len(prompt) if phase != "decode" else 0)
        assert one.receipt.steered_tokens[Phase.DECODE] == (STEPS - 1 if phase != "prefill" else 0)


def added(model: Any) -> list[torch.Tensor]:
    """What is added between LAYER and the next, per pass: [B, S, H]. To be called once the model is open."""
    layers, left, seen = model.get_decoder().layers, [], []

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    layers[LAYER].register_forward_hook(lambda _m, _args, output: left.append(first(output).clone()))
    layers[LAYER + 1].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]) - left.pop()),
        with_kwargs=True,
    )
    return seen


@pytest.mark.parametrize("name", SERVED)
def test_every_token_of_a_phase_receives_its_vector_and_no_other_does(name: str) -> None:
    built = stateful.model(name)
    model = SteeredModel(built)
    seen = added(built)
    for phase in ("prefill", "decode"):
        seen.clear()
        model.generate(PROMPTS, spec(phase), max_new_tokens=4)
        steered = torch.cat(seen, dim=1).abs().sum(-1) > 1
        expected = torch.zeros(3, 7 + 3, dtype=torch.bool)
        for row, prompt in enumerate(PROMPTS):
            expected[row, 7 - len(prompt) : 7] = phase == "prefill"
        expected[:, 7:] = phase == "decode"
        assert torch.equal(steered, expected)


@pytest.mark.parametrize("name", stateful.BROKEN_IN_BATCHES)
def test_a_model_that_cannot_run_a_batch_is_refused_when_it_is_opened(name: str) -> None:
    with pytest.raises(SteeringError, match="model: "):
        SteeredModel(stateful.model(name))


def progress(lengths: Sequence[int] = (3, 2), **options: Any) -> Progress:
    return Progress(pad([[1] * length for length in lengths], "left", 0, torch.device("cpu")), **options)


def choose(seen: Progress, length: int, tokens: Sequence[int] | None = None) -> None:
    ids = torch.ones(seen.rows, length, dtype=torch.int64)
    if tokens is not None:
        ids[:, -1] = torch.tensor(tokens)
    seen(ids, ())


def test_passes_with_a_state_bring_the_prompt_and_then_one_new_token_each() -> None:
    seen = progress()
    starts = [seen.enter(2, 3)]
    for length in (4, 5, 6):
        choose(seen, length)
        starts.append(seen.enter(2, 1))
    assert starts == [0, 3, 4, 5]
    assert seen.reached.tolist() == [6, 6]


def test_passes_without_a_state_bring_whole_sequences_again() -> None:
    seen = progress()
    starts = [seen.enter(2, 3)]
    for length in (4, 5):
        choose(seen, length)
        starts.append(seen.enter(2, length))
    assert starts == [0, 0, 0]


def test_a_prompt_may_come_in_pieces() -> None:
    seen = progress((5,))
    assert [seen.enter(1, 2), seen.enter(1, 2), seen.enter(1, 1)] == [0, 2, 4]
    choose(seen, 6)
    assert seen.enter(1, 1) == 5


def test_guesses_that_are_taken_back_do_not_move_what_follows() -> None:
    seen = progress((3,), guesses=True)
    assert seen.enter(1, 3 + 2) == 0  # a prompt and two guesses
    choose(seen, 4)  # none was right
    choose(seen, 4 + 3)  # some releases ask about the next guesses before they run them
    assert seen.enter(1, 1 + 3) == 3
    choose(seen, 7)  # two were right, and one token more came of it
    assert seen.enter(1, 1 + 1) == 6


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([(3, 3)], "ran 3 rows where 2 were due"),
        ([(2, 5)], "ran 5 tokens for prompts of 3: tokens that are not in the prompt"),
        ([(2, 3), (2, 1)], "once more before a token was chosen"),
        ([(2, 2), 4], "ran 2 of 3 prompt tokens"),
        ([(2, 3), 4, (2, 2)], "ran 2 tokens where 1 or all 4 were due"),
        ([(2, 3), 4, 5], "chose a token without running its decoder layers"),
    ],
)
def test_a_pass_whose_tokens_cannot_be_known_is_refused(passes: list[Any], message: str) -> None:
    seen = progress()

    def run() -> None:
        for one in passes:
            seen.enter(*one) if isinstance(one, tuple) else choose(seen, one)

    with pytest.raises(SteeringError, match=message):
        run()


def test_rows_end_with_an_end_token_or_by_a_criterion_only_where_ended_rows_are_padded() -> None:
    def stop_last(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([False, ids.shape[1] == 5])

    for ends, expected in (({9}, [3, 4]), (set(), [np.iinfo(np.int64).max] * 2)):
        seen = progress(ends=frozenset(ends), criteria=[stop_last])
        seen.enter(2, 3)
        choose(seen, 4, [9, 1])
        seen.enter(2, 1)
        choose(seen, 5, [0, 1])
        assert seen.ended.tolist() == expected


def test_a_processor_that_runs_the_model_itself_is_refused() -> None:
    built = FAMILIES["llama"].model()

    def rerun(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 0 * built(input_ids=ids[:, -1:]).logits[:, -1]

    with SteeredModel(built) as model, pytest.raises(SteeringError, match="a logits processor may have run it"):
        model.generate(PROMPTS, spec(), max_new_tokens=3, logits_processor=LogitsProcessorList([rerun]))


def test_a_layer_that_is_left_out_of_a_pass_is_no_silent_loss() -> None:
    built = FAMILIES["llama"].model()
    with SteeredModel(built) as model:
        skipped = built.model.layers[LAYER]
        original, calls = built.model.layers, []

        class Skipping(torch.nn.ModuleList):
            def __iter__(self) -> Any:
                calls.append(1)
                return iter([layer for layer in original if len(calls) < 2 or layer is not skipped])

            def __getitem__(self, index: Any) -> Any:
                return list(self) if isinstance(index, slice) else original[index]

        built.model.layers = Skipping(original)
        with pytest.raises(SteeringError, match="post_block:1: was run 0 times in one forward pass"):
            model.generate(PROMPTS, spec(), max_new_tokens=4)
