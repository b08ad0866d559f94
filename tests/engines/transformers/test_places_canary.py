"""The short generation with which a model is opened: what it finds, what it leaves as it was, what it costs."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import BertConfig, BertLMHeadModel, LlamaModel

from trimtab.engines.transformers import SteeredModel, groups
from trimtab.engines.transformers.progress import Progress
from trimtab.errors import SteeringError
from trimtab.instrument.hookmap import map_hook_points

PROMPTS = [[5, 17, 3, 44, 9], [7, 8]]


def always(start: int) -> Any:
    def first_column(self: Progress, columns: int) -> int:
        return start

    return first_column


def one_late(self: Progress, columns: int) -> int:
    return self._length - columns + 1


@pytest.mark.parametrize("broken", [always(0), one_late], ids=["always the first column", "one column late"])
def test_a_model_whose_places_are_counted_wrongly_is_refused(llama: Any, monkeypatch: Any, broken: Any) -> None:
    monkeypatch.setattr(Progress, "_first_column", broken)
    with pytest.raises(SteeringError, match="steered by position: steering did not act where it should"):
        SteeredModel(llama)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_a_model_that_is_steered_by_another_strength_is_refused(llama: Any, monkeypatch: Any, factor: float) -> None:
    emit = groups.emit
    monkeypatch.setattr(groups, "emit", lambda m, hook, x: x + factor * (emit(m, hook, x) - x))
    with pytest.raises(SteeringError, match="steering did not act where it should in the pass over the prompts"):
        SteeredModel(llama)


def test_a_model_that_cannot_generate_two_rows_is_refused_with_its_own_reason(llama: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise IndexError("no such row")

    llama.generate = fail
    with pytest.raises(
        SteeringError, match="model: LlamaForCausalLM failed in a short generation: IndexError: no such"
    ):
        SteeredModel(llama)


def test_opening_leaves_random_state_hooks_modes_and_settings_as_they_were(llama: Any) -> None:
    llama.train()
    llama.generation_config.update(do_sample=True, num_beams=2, guidance_scale=1.5, eos_token_id=list(range(96)))
    before = llama.generation_config.to_dict()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    SteeredModel(llama)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in llama.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    assert llama.generation_config.to_dict() == before


def test_the_short_generation_runs_a_few_passes_over_a_handful_of_tokens(llama: Any) -> None:
    sizes: list[int] = []
    llama.model.register_forward_pre_hook(
        lambda _m, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    map_hook_points(llama)
    before = len(sizes), sum(sizes)
    sizes.clear()
    SteeredModel(llama)
    assert len(sizes) - before[0] == 5
    assert sum(sizes) - before[1] == 6 + 6 + 2 + 2 + 10


def test_a_model_without_a_head_can_be_read_and_nothing_else() -> None:
    with SteeredModel(LlamaModel(FAMILIES["llama"].model().config).eval()) as model:
        assert next(iter(model.activations(PROMPTS, [(1, "post_block")])[0].values())).shape == (5, 32)
        with pytest.raises(SteeringError, match="model: LlamaModel cannot generate"):
            model.generate(PROMPTS, max_new_tokens=1)


def test_layers_may_lie_in_a_part_that_takes_no_token_ids() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertLMHeadModel(BertConfig(vocab_size=96, is_decoder=True, **sizes)).eval()
    with SteeredModel(bert) as model:
        read = model.activations(PROMPTS, [(1, "post_block")])
    for prompt, rows in zip(PROMPTS, read, strict=True):
        alone = bert(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(torch.from_numpy(next(iter(rows.values()))), alone.detach(), atol=1e-5, rtol=1e-5)


def test_half_precision_opens_and_its_rounding_is_no_fault() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert SteeredModel(FAMILIES["qwen3-moe"].model().to(dtype)).sites.num_layers == 3


def test_a_compiled_model_is_refused_when_it_is_opened_and_when_it_was_compiled_since(llama: Any) -> None:
    with SteeredModel(llama) as model:
        llama.model.layers[1].compile(backend="eager")
        with pytest.raises(SteeringError, match=r"model: model\.layers\.1 is compiled"):
            model.generate(PROMPTS, max_new_tokens=1)
    with pytest.raises(SteeringError, match=r"model: model\.layers\.1 is compiled"):
        SteeredModel(llama)
