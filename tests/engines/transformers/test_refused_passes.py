"""Passes and models that must not be taken for what was asked: rows of another call, layers left out, compiled ones."""

from types import SimpleNamespace

import pytest
import torch
from oracle import Addition
from transformers import GenerationConfig

from trimtab import SteeringError
from trimtab.engines.transformers import SteeredModel
from trimtab.engines.transformers.prompts import encode

PROMPTS = [[5, 17, 3], [7, 8, 9]]
PUSH = Addition("mlp_in", (1,), torch.ones(32))
SPEC = {"interventions": [PUSH.spec()]}


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_pass_that_leaves_out_a_steered_site_is_refused_whichever_it_is(llama, monkeypatch, skipped: int) -> None:
    model, layer, passes = SteeredModel(llama), llama.model.layers[1], []
    run = layer.forward

    def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        passes.append(None)
        return hidden_states if len(passes) == skipped + 1 else run(hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(SteeringError, match="mlp_in:1: was run 0 times in one forward pass"):
        model.generate(PROMPTS, SPEC, max_new_tokens=3)
    assert len(passes) == skipped + 1  # at once: nothing that was not steered goes on


def test_rows_of_another_call_are_refused_where_nobody_is_steered(llama) -> None:
    def run_one_row(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        llama(input_ids[:1])
        return scores

    with pytest.raises(SteeringError, match="ran 1 rows where 2 were due"):
        SteeredModel(llama).generate(PROMPTS, max_new_tokens=3, logits_processor=[run_one_row])


def test_a_dict_of_results_is_refused_in_a_generation_config_too(llama) -> None:
    config = GenerationConfig(return_dict_in_generate=True, max_new_tokens=2)
    with pytest.raises(SteeringError, match="return_dict_in_generate"):
        SteeredModel(llama).generate(PROMPTS, generation_config=config)


def test_a_model_with_one_compiled_layer_is_refused_by_that_layer(llama, monkeypatch) -> None:
    monkeypatch.setattr(llama.model.layers[1], "_compiled_call_impl", lambda *_: None)
    with pytest.raises(SteeringError, match=r"model\.layers\.1 is compiled"):
        SteeredModel(llama)


@pytest.mark.parametrize("adds", [0, 1])
def test_a_rendered_prompt_keeps_one_begin_token(adds: int) -> None:
    class Tokenizer(SimpleNamespace):
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1] * adds + [1, 7]}

    (prompt,) = encode(["<bos>hi"], Tokenizer(bos_token_id=1, bos_token="<bos>", chat_template=None), 96)
    assert prompt.ids == [1, 7]
