"""Every option of `generate` is honoured or refused by name, wherever it is given."""

import inspect
from typing import Any

import pytest
import torch
from families import FAMILIES
from oracle import Addition
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CompileConfig, GenerationConfig, GenerationMixin, PreTrainedTokenizerFast, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from trimtab.engines.transformers import SteeredModel
from trimtab.engines.transformers import options as table
from trimtab.errors import SteeringError
from trimtab.sites import Phase

PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11]]
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(1))
PUSH = {"interventions": [Addition("post_block", (0, 1), VECTOR, scale=1.5).spec()]}

REFUSED_VALUES: dict[str, Any] = {
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_model": object(),
    "assistant_tokenizer": object(),
    "compile_config": CompileConfig(),
    "constraints": [1],
    "continuous_batching_config": object(),
    "custom_generate": "somebody/loop",
    "diversity_penalty": 0.5,
    "dola_layers": "high",
    "force_words_ids": [[1]],
    "guidance_scale": 1.5,
    "inputs": torch.ones(1, 1),
    "is_assistant": True,
    "negative_prompt_attention_mask": torch.ones(1, 1),
    "negative_prompt_ids": torch.ones(1, 1),
    "num_beam_groups": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "penalty_alpha": 0.6,
    "speculation_type": "dflash",
    "synced_gpus": True,
    "token_healing": True,
    "trust_remote_code": True,
    "use_mtp": True,
}


def installed() -> set[str]:
    config = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    return config | arguments | {"tokenizer", "assistant_tokenizer", "trust_remote_code"}


def test_every_option_of_the_installed_transformers_is_in_one_table() -> None:
    tables = (set(table.REFUSED), set(table.HANDLED), set(table.PASSED))
    assert installed() <= set().union(*tables), "a new option: decide whether it changes which rows or tokens run"
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("name", sorted(table.REFUSED))
def test_a_refused_option_is_refused_by_name_wherever_it_is_given(llama: Any, name: str) -> None:
    value = REFUSED_VALUES[name]
    with SteeredModel(llama) as model:
        with pytest.raises(SteeringError, match=f"^{name}: cannot be given: "):
            model.generate(PROMPTS, PUSH, max_new_tokens=2, **{name: value})
        if name not in vars(GenerationConfig()):
            return
        config = GenerationConfig(max_new_tokens=2)
        setattr(config, name, value)
        with pytest.raises(SteeringError, match=rf"^generation_config\.{name}: cannot be given: "):
            model.generate(PROMPTS, PUSH, generation_config=config)
        setattr(llama.generation_config, name, value)
        with pytest.raises(SteeringError, match=rf"^model\.generation_config\.{name}: cannot be given: "):
            model.generate(PROMPTS, PUSH, max_new_tokens=2)
        neutral = table.NEUTRAL.get(name)
        assert model.generate(PROMPTS[:1], PUSH, max_new_tokens=2, **{name: neutral})[0].receipt.sites


@pytest.mark.parametrize("name", sorted(table.REFUSED_INPUTS))
def test_an_input_that_would_bring_tokens_or_state_from_elsewhere_is_refused_by_name(llama: Any, name: str) -> None:
    with SteeredModel(llama) as model, pytest.raises(SteeringError, match=f"^{name}: cannot be given: "):
        model.generate(PROMPTS, PUSH, max_new_tokens=2, **{name: torch.ones(3, 1)})


def test_a_cache_is_refused_whatever_the_argument_is_called(llama: Any) -> None:
    from transformers import DynamicCache

    with SteeredModel(llama) as model, pytest.raises(SteeringError, match="newer_name: cannot be given: a cache"):
        model.generate(PROMPTS, PUSH, max_new_tokens=2, newer_name=DynamicCache())


def test_an_option_that_a_newer_release_brings_is_refused_once_it_is_set(llama: Any, monkeypatch: Any) -> None:
    before = GenerationConfig.__init__

    def newer(self: GenerationConfig, **given: Any) -> None:
        self.parallel_worlds = given.pop("parallel_worlds", None)
        before(self, **given)

    with SteeredModel(llama) as model:
        monkeypatch.setattr(GenerationConfig, "__init__", newer)
        assert model.generate(PROMPTS[:1], PUSH, max_new_tokens=1)
        with pytest.raises(SteeringError, match="parallel_worlds: cannot be given: it is new"):
            model.generate(PROMPTS[:1], PUSH, max_new_tokens=1, parallel_worlds=2)


def test_the_model_s_own_custom_settings_are_not_taken_for_options(llama: Any) -> None:
    llama.generation_config.chat_format = "chatml"
    with SteeredModel(llama) as model:
        assert model.generate(PROMPTS[:1], PUSH, max_new_tokens=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"return_dict_in_generate": True}, "return_dict_in_generate: cannot be given: the results are objects"),
        ({"cache_implementation": "paged"}, "cache_implementation: cannot be given"),
        ({"generation_config": {"max_new_tokens": 2}}, "generation_config: is a dict"),
        ({"eos_token_id": "end"}, "eos_token_id: is 'end'; want a token id"),
        ({"stop_strings": ["x"]}, "stop_strings: need a tokenizer"),
        ({"stopping_criteria": [EosTokenCriteria(3)]}, r"stopping_criteria\[0\]: .* give eos_token_id"),
        ({"stopping_criteria": [MaxLengthCriteria(9)]}, r"stopping_criteria\[0\]: .* give max_new_tokens"),
    ],
    ids=lambda item: next(iter(item)) if isinstance(item, dict) else "",
)
def test_values_that_cannot_be_honoured_are_refused_by_name(llama: Any, given: dict[str, Any], message: str) -> None:
    with SteeredModel(llama) as model, pytest.raises(SteeringError, match=message):
        model.generate(PROMPTS, PUSH, **{"max_new_tokens": 2, **given})


def test_what_counts_is_what_transformers_itself_makes_of_the_three_places(llama: Any) -> None:
    llama.generation_config.update(eos_token_id=3, pad_token_id=4, num_beams=2)
    config = GenerationConfig(eos_token_id=5, num_beams=3)
    cases: list[dict[str, Any]] = [
        {},
        {"eos_token_id": None},
        {"eos_token_id": 7},
        {"generation_config": config},
        {"generation_config": config, "eos_token_id": None, "num_beams": 1},
    ]
    for given in cases:
        rest = {name: value for name, value in given.items() if name != "generation_config"}
        theirs, _ = llama._prepare_generation_config(given.get("generation_config"), **rest)
        for name in ("eos_token_id", "pad_token_id", "num_beams"):
            ours = table.effective(name, given, llama.generation_config)[0]
            assert (ours or 1) == (getattr(theirs, name) or 1), (given, name)


def test_no_end_token_given_as_none_means_that_nothing_ends(llama: Any) -> None:
    with SteeredModel(llama) as model:
        free = model.generate(PROMPTS, PUSH, max_new_tokens=12)
        llama.generation_config.eos_token_id = free[0].token_ids[3]
        ended = model.generate(PROMPTS, PUSH, max_new_tokens=12)
        assert len(ended[0].token_ids) <= 4
        out = model.generate(PROMPTS, PUSH, max_new_tokens=12, eos_token_id=None)
    assert [one.token_ids for one in out] == [one.token_ids for one in free]
    assert [one.receipt.steered_tokens[Phase.DECODE] for one in out] == [11, 11, 11]


def raw(model: Any, prompt: list[int], **options: Any) -> Any:
    """What Transformers returns for one prompt of a model whose layers 0 and 1 always add the vector."""

    def always(layer: int, hook: str, value: torch.Tensor) -> torch.Tensor:
        return value + 1.5 * VECTOR if hook == "post_block" and layer < 2 else value

    ids = torch.tensor([prompt])
    return (
        FAMILIES["llama"]
        .edited(model, always)
        .generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, return_dict_in_generate=True, **options
        )
    )


@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_scores_and_logits_are_handed_through_per_prompt_and_token(extra: dict[str, Any]) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "output_logits": True, **extra}
    with SteeredModel(FAMILIES["llama"].model()) as model:
        out = model.generate(PROMPTS, PUSH, **options)
        assert model.generate(PROMPTS, PUSH, max_new_tokens=1)[0].logits is None
    copies = extra.get("num_return_sequences", 1)
    for index, prompt in enumerate(PROMPTS):
        theirs = raw(FAMILIES["llama"].model(), prompt, **options)
        for copy in range(copies):
            one = out[index * copies + copy]
            assert one.token_ids == theirs.sequences[copy, len(prompt) :].tolist()
            rows = theirs.beam_indices[copy].tolist() if extra else [0] * 4
            for name, ours in (("scores", one.scores), ("logits", one.logits)):
                expected = torch.stack([step[row] for step, row in zip(getattr(theirs, name), rows, strict=True)])
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_scores_end_where_an_output_does(llama: Any) -> None:
    with SteeredModel(llama) as model:
        free = model.generate(PROMPTS, PUSH, max_new_tokens=6)
        out = model.generate(
            PROMPTS, PUSH, max_new_tokens=6, eos_token_id=free[0].token_ids[1], output_scores=True, output_logits=True
        )
    for one in out:
        assert one.scores is not None
        assert one.logits is not None
        assert one.scores.shape == one.logits.shape == (len(one.token_ids), 96)
        assert one.scores.argmax(-1).tolist() == one.token_ids


def test_a_streamer_receives_the_steered_tokens_as_they_come(llama: Any) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Kept()
    with SteeredModel(llama) as model:
        (out,) = model.generate(PROMPTS[:1], PUSH, max_new_tokens=5, streamer=streamer)
    assert streamer.seen == PROMPTS[0] + out.token_ids
    assert streamer.ended


def test_stop_strings_end_an_output_and_its_steering(llama: Any) -> None:
    letters = Tokenizer(models.WordLevel({chr(33 + index): index for index in range(96)}, unk_token="!"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="!")
    with SteeredModel(llama, tokenizer) as model:
        free = model.generate(PROMPTS, PUSH, max_new_tokens=6)
        word = tokenizer.decode([free[1].token_ids[2]])
        out = model.generate(PROMPTS, PUSH, max_new_tokens=6, stop_strings=[word], eos_token_id=1, pad_token_id=0)
    for one, full in zip(out, free, strict=True):
        words = [tokenizer.decode([token]) for token in full.token_ids]
        count = words.index(word) + 1 if word in words else 6
        assert one.token_ids == full.token_ids[:count]
        assert one.receipt.steered_tokens[Phase.DECODE] == count - 1


def test_a_criterion_that_stops_a_row_keeps_a_last_token_that_looks_like_padding(llama: Any) -> None:
    def after_two(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= 5 + 2, False])

    with SteeredModel(llama) as model:
        free = model.generate(PROMPTS[:2], PUSH, max_new_tokens=5)
        last = free[0].token_ids[1]
        out = model.generate(
            PROMPTS[:2],
            PUSH,
            max_new_tokens=5,
            pad_token_id=last,
            eos_token_id=95,
            stopping_criteria=StoppingCriteriaList([after_two]),
        )
    assert out[0].token_ids == free[0].token_ids[:2]
    assert out[1].token_ids == free[1].token_ids
    assert out[0].receipt.steered_tokens == {Phase.PREFILL: 5, Phase.DECODE: 1}
