"""Which of Transformers' generation options are honoured, and which are refused by name.

An option can stand in three places: among the arguments, in a `generation_config`, and in the model's own defaults.
Each option that Transformers knows is in one of the tables below; one that a newer release brings is refused as soon as
it is set, since it may change which rows or tokens run. Model inputs that are no options (images, token types) pass,
but for those that would bring tokens, places or state from elsewhere.
"""

from collections.abc import Mapping
from typing import Any

from trimtab.errors import SteeringError

_DRAFTS = "draft tokens of another model, or of a part of this one, would need steering of their own"
_LOOP = "it runs another decoding loop, which may place tokens where their phase is unknown"
_GUIDANCE = "its second, unconditional pass is another sequence, and nothing says how to steer that"
_CACHE = "a cache from elsewhere would hold tokens whose steering is unknown"
_SHAPE = "its shape depends on padding and on the way in which tokens are run; `activations` reads single sites"

REFUSED: Mapping[str, str] = {
    "assistant_early_exit": _DRAFTS,
    "assistant_ensemble_weight": _DRAFTS,
    "assistant_model": _DRAFTS,
    "assistant_tokenizer": _DRAFTS,
    "compile_config": "a compiled pass would keep this call's hooks after it",
    "constraints": _LOOP,
    "continuous_batching_config": _LOOP,
    "custom_generate": _LOOP,
    "diversity_penalty": _LOOP,
    "dola_layers": _LOOP,
    "force_words_ids": _LOOP,
    "guidance_scale": _GUIDANCE,
    "inputs": "pass the prompts as the first argument",
    "is_assistant": _DRAFTS,
    "negative_prompt_attention_mask": _GUIDANCE,
    "negative_prompt_ids": _GUIDANCE,
    "num_beam_groups": _LOOP,
    "output_attentions": _SHAPE,
    "output_hidden_states": _SHAPE,
    "penalty_alpha": _LOOP,
    "speculation_type": _DRAFTS,
    "synced_gpus": "it repeats passes after the last token",
    "token_healing": "it rewrites the prompts, so what their tokens are would be unknown",
    "trust_remote_code": _LOOP,
    "use_mtp": _DRAFTS,
}
"""Refused unless they are None, False or neutral."""

NEUTRAL: Mapping[str, Any] = {"guidance_scale": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0}
"""Values with which a refused option changes nothing."""

REFUSED_INPUTS: Mapping[str, str] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids"), "pass the prompts as the first argument"),
    **dict.fromkeys(("inputs_embeds", "decoder_inputs_embeds"), "prompts must be strings or lists of token ids"),
    **dict.fromkeys(("attention_mask", "decoder_attention_mask"), "padding is handled here"),
    **dict.fromkeys(("position_ids", "cache_position"), "positions follow from the prompts' lengths"),
    **dict.fromkeys(
        ("past_key_values", "cache", "cache_params", "state", "mems", "past_buckets_states", "encoder_outputs"), _CACHE
    ),
}
"""Model inputs that are refused unless they are None."""

# fmt: off
HANDLED = frozenset((
    "eos_token_id", "num_beams", "num_return_sequences", "output_logits", "output_scores", "pad_token_id",
    "prompt_lookup_num_tokens", "return_dict_in_generate", "stop_strings", "stopping_criteria", "tokenizer",
    "generation_config", "cache_implementation", "disable_compile",
))
# fmt: on
"""Options that this engine acts on."""

# fmt: off
PASSED = frozenset((
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "cache_config", "decoder_start_token_id", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty",
    "logits_processor", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size",
    "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "prefill_chunk_size", "prefix_allowed_tokens_fn",
    "remove_invalid_values", "renormalize_logits", "repetition_penalty", "sequence_bias", "streamer",
    "suppress_tokens", "target_lookbehind", "temperature", "top_h", "top_k", "top_p", "transformers_version",
    "typical_p", "use_cache", "watermarking_config",
))
# fmt: on
"""Options that Transformers acts on: they choose tokens, lengths and memory, or do nothing without a draft model."""


def effective(name: str, given: Mapping[str, Any], defaults: Any) -> tuple[Any, str]:
    """The value that `generate` will use for `name`, and where it stands: the argument, even if it is None, then what a
    `generation_config` sets, then `defaults`, the model's own."""
    if name in given:
        return given[name], name
    value = getattr(given.get("generation_config"), name, None)
    if value is not None:
        return value, f"generation_config.{name}"
    return getattr(defaults, name, None), f"model.generation_config.{name}"


def check_options(given: Mapping[str, Any], defaults: Any) -> None:
    """Raise SteeringError for an option or a model input that cannot be honoured, naming the place where it stands."""
    config = given.get("generation_config")
    if config is not None and not isinstance(config, type(defaults)) and not hasattr(config, "to_dict"):
        raise SteeringError("generation_config", f"is a {type(config).__name__}; want a GenerationConfig")
    for name, value in given.items():
        if value is not None and name in REFUSED_INPUTS:
            raise SteeringError(name, f"cannot be given: {REFUSED_INPUTS[name]}")
        if hasattr(value, "get_seq_length"):
            raise SteeringError(name, f"cannot be given: {_CACHE}")
    for name in sorted({*REFUSED, *option_names(defaults)} - HANDLED - PASSED):
        value, place = effective(name, given, defaults)
        if value is None or value is False or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        why = REFUSED.get(name, "it is new in this release of Transformers, and may change which tokens run")
        raise SteeringError(place, f"cannot be given: {why}")
    if given.get("return_dict_in_generate") or getattr(config, "return_dict_in_generate", None):
        raise SteeringError(
            "return_dict_in_generate",
            "cannot be given: the results are objects already; output_scores and output_logits add to them",
        )
    value, place = effective("cache_implementation", given, defaults)
    if value == "paged":
        raise SteeringError(place, f"cannot be given: {_LOOP}")


def option_names(defaults: Any) -> set[str]:
    """The options of the installed Transformers, `defaults` being a GenerationConfig of it."""
    return {name for name in vars(type(defaults)()) if not name.startswith("_")}


def end_tokens(given: Mapping[str, Any], defaults: Any) -> frozenset[int]:
    """The token ids that end an output; none where generation runs to its length."""
    value, place = effective("eos_token_id", given, defaults)
    listed = value.tolist() if hasattr(value, "tolist") else value
    if listed is None:
        return frozenset()
    tokens = listed if isinstance(listed, (list, tuple)) else [listed]
    if not all(isinstance(token, int) for token in tokens):
        raise SteeringError(place, f"is {value!r}; want a token id or a list of them")
    return frozenset(tokens)
