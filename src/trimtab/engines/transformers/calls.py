"""One call of Transformers' `generate`, watched from its first forward pass to its last."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from trimtab.engines.transformers.options import check_options, effective, end_tokens
from trimtab.engines.transformers.pass_tokens import PassTokens
from trimtab.engines.transformers.progress import Progress
from trimtab.engines.transformers.prompts import PromptBatch
from trimtab.engines.transformers.results import Outputs
from trimtab.engines.transformers.session import SteeringSession
from trimtab.errors import SteeringError
from trimtab.instrument.hookmap import HookMap
from trimtab.instrument.layer_replay import evaluating
from trimtab.program import ResolvedSteering


@dataclass(frozen=True)
class Call:
    """The options of one call, and what of them decides where tokens stand."""

    options: Mapping[str, Any]
    ends: frozenset[int] = frozenset()
    pad_token: int | None = None
    copies: int = 1  # rows per prompt
    beams: bool = False
    guesses: bool = False
    criteria: tuple[Callable[..., Any], ...] = ()  # the caller's own; stop strings are one

    @classmethod
    def of(cls, model: Any, tokenizer: Any, given: Mapping[str, Any]) -> Self:
        """What a caller gave as keyword arguments. Raises SteeringError for what cannot be honoured."""
        if not hasattr(model, "generate"):
            raise SteeringError("model", f"{type(model).__name__} cannot generate; its activations can be read")
        check_not_compiled(model)
        defaults = model.generation_config
        check_options(given, defaults)

        def value(name: str) -> Any:
            return effective(name, given, defaults)[0]

        beams = value("num_beams") or 1
        return cls(
            options={name: item for name, item in given.items() if name != "stopping_criteria"},
            ends=end_tokens(given, defaults),
            pad_token=value("pad_token_id"),
            copies=max(beams, value("num_return_sequences") or 1),
            beams=beams > 1,
            guesses=value("prompt_lookup_num_tokens") is not None,
            criteria=tuple(_criteria(given, value("stop_strings"), tokenizer)),
        )

    def padded_with(self, token: int) -> Self:
        """The same call, its padding filled with `token`."""
        return replace(self, pad_token=token)

    def arguments(self, batch: PromptBatch, progress: Progress) -> dict[str, Any]:
        """What `generate` is called with."""
        return {
            **self.options,
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pad_token_id": self.pad_token,
            "stop_strings": None,  # among the criteria
            "stopping_criteria": [progress],
            "return_dict_in_generate": True,
            "disable_compile": True,  # a compiled pass would keep this call's hooks after it
        }


def check_not_compiled(model: nn.Module) -> None:
    """Raise SteeringError where `model` or a part of it was compiled: a compiled pass runs the hooks of one call, in
    other calls too."""
    for name, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            raise SteeringError("model", f"{name or type(model).__name__} is compiled; give the model as it was before")


def generate_steered(
    model: Any,
    hook_map: HookMap,
    batch: PromptBatch,
    steering: Sequence[ResolvedSteering | None],
    call: Call,
    *,
    homes: Mapping[int, torch.device],
    observe: Callable[[], Any] | None = None,
) -> tuple[Outputs, SteeringSession | None]:
    """Run the call. `steering[b]` acts on row b of `batch`; nobody steered needs no session.

    `observe` is entered, as a context, once the taps are in place: what it hooks sees steered tensors.
    Raises SteeringError where the model runs tokens whose place cannot be known.
    """
    progress = Progress(
        batch,
        copies=call.copies,
        ends=call.ends,
        criteria=call.criteria,
        beams=call.beams,
        guesses=call.guesses,
    )
    session = tokens = None
    if any(item is not None and item.spans is not None and item.spans.decided_by_tokens for item in steering):
        tokens = PassTokens(rewinds=call.beams or call.guesses)
    if any(item is not None for item in steering):
        session = SteeringSession(hook_map, batch, steering, progress, tokens, dtype=model.dtype, homes=homes)
    with evaluating(model), ExitStack() as stack:
        if tokens is not None:
            stack.enter_context(tokens.watching(model))
        first_layer = next(iter(hook_map.decoder))
        stack.enter_context(progress.watching(first_layer, None if session is None else session.begin))
        if session is not None:
            stack.enter_context(session.steering())
        if observe is not None:
            stack.enter_context(observe())
        raw = model.generate(**call.arguments(batch, progress))
    if not progress.passes:
        raise SteeringError("model", "it generated without running its decoder layers; nothing was steered")
    return Outputs(raw, progress), session


def _criteria(given: Mapping[str, Any], stop_strings: Any, tokenizer: Any) -> list[Callable[..., Any]]:
    """The caller's stopping criteria, and one for stop strings: `generate` pads the rows that they stop."""
    criteria = list(given.get("stopping_criteria") or ())
    for index, criterion in enumerate(criteria):
        for own, option in (("eos_token_id", "eos_token_id"), ("max_length", "max_new_tokens")):
            if hasattr(criterion, own):
                raise SteeringError(
                    f"stopping_criteria[{index}]", f"is one that `generate` makes; give {option} instead"
                )
    if stop_strings:
        from transformers import StopStringCriteria

        reader = given.get("tokenizer") or tokenizer
        if reader is None:
            raise SteeringError("stop_strings", "need a tokenizer, and the model has none; give `tokenizer`")
        criteria.append(StopStringCriteria(reader, stop_strings))
    return criteria
