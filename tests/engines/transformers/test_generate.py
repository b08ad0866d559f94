"""Generation: phases, padding, ends, receipts, sampling, beams, and other ways through Transformers' `generate`."""

import pytest
import torch
from families import FAMILIES
from oracle import Addition, Recorder, greedy
from transformers import GenerationConfig

from trimtab.engines.transformers import SteeredModel
from trimtab.sites import Phase, Site

PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11]]
LLAMA = FAMILIES["llama"]


def vector(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(32, generator=torch.Generator().manual_seed(seed))


def spec(*additions: Addition) -> dict:
    return {"interventions": [addition.spec() for addition in additions]}


PUSH = Addition("post_block", (0, 1), vector(1), scale=1.5)
DECODE = Addition("post_attn", (1,), vector(2), phase="decode")
PREFILL = Addition("pre_attn", (2,), vector(3), phase="prefill")


def watch_steering(model, layer: int) -> list[torch.Tensor]:
    """What is added between a layer and the next, per pass: [B, S, H]. To be called before the model is steered."""
    left: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    model.model.layers[layer].register_forward_hook(lambda _m, _args, output: left.append(output.clone()))
    model.model.layers[layer + 1].register_forward_pre_hook(lambda _m, args: added.append(args[0] - left.pop()))
    return added


def test_padding_is_never_steered_nor_are_rows_without_a_spec(llama):
    push = Addition("post_block", (0,), vector(1))
    with SteeredModel(llama) as model:
        added = watch_steering(llama, 0)
        model.generate(PROMPTS, [spec(push), None, spec(push)], max_new_tokens=1)
    expected = torch.zeros(3, 7, 32)
    expected[0, 2:] = expected[2] = push.vector  # five tokens after two of padding; no padding
    torch.testing.assert_close(added[0], expected, atol=1e-5, rtol=0)
    assert not added[0][expected == 0].any()


def test_a_row_that_has_ended_is_padding_and_no_longer_steered(llama):
    both = spec(Addition("post_block", (0,), vector(1), scale=0.125))
    prompts = [PROMPTS[0], PROMPTS[1]]
    with SteeredModel(llama) as model:
        free = [out.token_ids for out in model.generate(prompts, both, max_new_tokens=6)]
        end = next(token for token in free[0][:3] if token not in free[1])
        stop = free[0].index(end)
        added = watch_steering(llama, 0)
        out = model.generate(prompts, both, max_new_tokens=6, eos_token_id=end, pad_token_id=0)
    assert out[0].token_ids == free[0][: stop + 1]
    assert out[1].token_ids == free[1]
    assert out[0].receipt.steered_tokens == {Phase.PREFILL: 5, Phase.DECODE: stop}
    assert out[1].receipt.steered_tokens == {Phase.PREFILL: 2, Phase.DECODE: 5}
    steered = torch.cat(added, dim=1).any(-1).sum(1)
    assert steered.tolist() == [5 + stop, 2 + 5]  # the receipt's counts: the end token and what follows it are not


def test_an_end_token_inside_a_prompt_ends_nothing(llama):
    prompts = [[5, 95, 3, 95], [7, 8]]
    with SteeredModel(llama) as model:
        added = watch_steering(llama, 0)
        out = model.generate(prompts, spec(PUSH), max_new_tokens=2, eos_token_id=95)
    assert 95 not in out[0].token_ids
    assert torch.cat(added, dim=1).any(-1).sum(1).tolist() == [4 + 1, 2 + 1]


def test_a_model_in_training_mode_generates_without_dropout():
    model = FAMILIES["gpt2"].model()  # with dropout probabilities of 0.1
    with SteeredModel(model) as steered:
        expected = steered.generate(PROMPTS, [spec(PUSH), None, None], max_new_tokens=6)
        model.train()
        assert steered.generate(PROMPTS, [spec(PUSH), None, None], max_new_tokens=6) == expected
        assert model.training


def test_receipts_say_what_was_steered_where_and_in_which_phase(llama):
    with SteeredModel(llama) as model:
        out = model.generate(PROMPTS, [spec(PUSH), None, spec(DECODE)], max_new_tokens=4)
        same, _, other = model.generate(PROMPTS, [spec(PUSH), None, spec(PREFILL)], max_new_tokens=4)
    first, second, third = (generation.receipt for generation in out)
    assert first.sites == (Site(0, "post_block"), Site(1, "post_block"))
    assert first.steered_tokens == {Phase.PREFILL: 5, Phase.DECODE: 3}
    assert first.identity[Phase.PREFILL]
    assert first.identity == same.receipt.identity
    assert (second.identity, second.sites) == ({Phase.PREFILL: "", Phase.DECODE: ""}, ())
    assert second.steered_tokens == {Phase.PREFILL: 0, Phase.DECODE: 0}
    assert third.steered_tokens == {Phase.PREFILL: 0, Phase.DECODE: 3}
    assert other.receipt.steered_tokens == {Phase.PREFILL: 7, Phase.DECODE: 0}


def test_an_unsteered_batch_is_what_the_plain_model_generates(llama):
    ids = torch.tensor([[0, 0, *PROMPTS[0]], PROMPTS[2]])
    mask = (ids > 0).long()
    expected = llama.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5)[:, 7:].tolist()
    with SteeredModel(llama) as model:
        assert [out.token_ids for out in model.generate([PROMPTS[0], PROMPTS[2]], max_new_tokens=5)] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 95},  # Transformers 5.10 needs one to look for
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_other_ways_through_generate_steer_the_same_tokens(options):
    prompt = [[5, 6, 5, 6, 5, 6, 5]]  # repeats itself, so that looked-up guesses are made, kept and taken back
    steering = spec(PUSH, DECODE, PREFILL)
    expected, logits = greedy(LLAMA, LLAMA.model(), prompt, [[PUSH, DECODE, PREFILL]], 12)
    with SteeredModel(LLAMA.model()) as model:
        recorder = Recorder()
        out = model.generate(prompt, steering, max_new_tokens=12, logits_processor=[recorder], **options)
    assert out[0].token_ids[:12] == expected[0]  # with guesses Transformers 5.10 may write a token more
    assert 95 not in expected[0]
    assert out[0].receipt.steered_tokens == {Phase.PREFILL: 7, Phase.DECODE: len(out[0].token_ids) - 1}
    if "prompt_lookup_num_tokens" not in options:  # its logits come in another order
        torch.testing.assert_close(torch.stack(recorder.logits), torch.stack(logits), atol=1e-5, rtol=1e-5)


def test_without_a_cache_a_padded_batch_is_steered_as_with_one():
    steering = [spec(PUSH), None, spec(DECODE, PREFILL)]
    with SteeredModel(LLAMA.model()) as model:
        cached = [out.token_ids for out in model.generate(PROMPTS, steering, max_new_tokens=6)]
        whole = [out.token_ids for out in model.generate(PROMPTS, steering, max_new_tokens=6, use_cache=False)]
    assert cached == whole


@pytest.mark.parametrize(("beams", "returned"), [(3, 1), (3, 2)])
def test_beam_search_steers_every_beam_of_a_prompt_by_its_spec(beams, returned):
    options = {"num_beams": beams, "num_return_sequences": returned, "max_new_tokens": 5, "do_sample": False}
    with SteeredModel(LLAMA.model()) as model:
        out = model.generate([PROMPTS[0], PROMPTS[2], PROMPTS[0]], [spec(PUSH), None, None], **options)
    assert len(out) == 3 * returned

    def always(layer, hook, value):
        return value + PUSH.scale * PUSH.vector if hook == PUSH.hook and layer in PUSH.layers else value

    for index, (prompt, steered) in enumerate([(PROMPTS[0], True), (PROMPTS[2], False), (PROMPTS[0], False)]):
        reference = LLAMA.edited(LLAMA.model(), always) if steered else LLAMA.model()
        ids = torch.tensor([prompt])
        expected = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        ours = [generation.token_ids for generation in out[index * returned : (index + 1) * returned]]
        assert ours == expected[:, len(prompt) :].tolist()


def test_sampling_draws_from_the_steered_distribution_under_torch_seeds():
    options = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3, "max_new_tokens": 6}

    def first_prompt_only(layer, hook, value):
        value = value.clone()
        if hook == PUSH.hook and layer in PUSH.layers:
            value[:3] += PUSH.scale * PUSH.vector
        return value

    reference = LLAMA.edited(LLAMA.model(), first_prompt_only)
    ids = torch.tensor([PROMPTS[0], PROMPTS[0]])
    torch.manual_seed(3)
    expected = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    with SteeredModel(LLAMA.model()) as model:
        torch.manual_seed(3)
        out = model.generate([PROMPTS[0], PROMPTS[0]], [spec(PUSH), None], **options)
    assert [generation.token_ids for generation in out] == expected[:, 5:].tolist()
    assert [bool(generation.receipt.sites) for generation in out] == [True] * 3 + [False] * 3


def test_half_precision_is_rounded_once_and_unsteered_rows_not_at_all():
    push = Addition("post_attn", (0, 1), vector(1).bfloat16().float(), scale=0.5)
    prompts = [PROMPTS[0], PROMPTS[0]]
    _, logits = greedy(LLAMA, LLAMA.model().bfloat16(), prompts, [[push], []], 1)
    with SteeredModel(LLAMA.model().bfloat16()) as model:
        recorder = Recorder()
        model.generate(prompts, [spec(push), None], max_new_tokens=1, logits_processor=[recorder])
    assert torch.equal(recorder.logits[0], logits[0])


def test_outputs_end_with_the_end_token_and_hold_no_padding(llama):
    with SteeredModel(llama) as model:
        free = [out.token_ids for out in model.generate(PROMPTS, max_new_tokens=8)]
        end = free[0][2]
        ended = [out.token_ids for out in model.generate(PROMPTS, max_new_tokens=8, eos_token_id=end)]
    for full, cut in zip(free, ended, strict=True):
        assert cut == (full[: full.index(end) + 1] if end in full else full)
    assert len(ended[0]) <= 3


def test_text_comes_from_the_tokenizer_and_strings_may_be_prompts(llama, tokenizer):
    assert tokenizer.pad_token_id is None
    with SteeredModel(llama, tokenizer) as model:
        by_text = model.generate(["the sea is calm", "wind"], [None, spec(PUSH)], max_new_tokens=4)
        by_ids = model.generate([[2, 3, 4, 5], [8]], [None, spec(PUSH)], max_new_tokens=4)
    assert [out.token_ids for out in by_text] == [out.token_ids for out in by_ids]
    assert by_text[0].text == tokenizer.decode(by_text[0].token_ids, skip_special_tokens=True)
    assert by_text[0].text


def test_a_row_that_a_criterion_stops_holds_no_padding(llama):
    def after_two(input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 5 + 2, False])

    with SteeredModel(llama) as model:
        free = model.generate(PROMPTS[:2], max_new_tokens=6)
        assert not any({0, 95} & set(generation.token_ids) for generation in free)
        out = model.generate(
            PROMPTS[:2], max_new_tokens=6, pad_token_id=0, eos_token_id=95, stopping_criteria=[after_two]
        )
    assert out[0].token_ids == free[0].token_ids[:2]
    assert out[1].token_ids == free[1].token_ids


def test_a_generation_config_is_honoured_with_its_length_and_end_token(llama):
    with SteeredModel(llama) as model:
        free = model.generate(PROMPTS, [spec(PUSH), None, None], max_new_tokens=6)
        end = free[1].token_ids[2]
        config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=[end, 95], pad_token_id=0)
        out = model.generate(PROMPTS, [spec(PUSH), None, None], generation_config=config)
    assert len(out[1].token_ids) <= 3
    for generation, full in zip(out, free, strict=True):
        ids = full.token_ids[:5]
        assert generation.token_ids == (ids[: ids.index(end) + 1] if end in ids else ids)
