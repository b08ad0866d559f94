"""Before a model is first steered: does a token's place mean in it what it should?

A short generation from two prompts of different lengths, with one vector for prompt tokens and another for new ones, is
compared at the first layer with a plain forward pass over the same tokens, to which the vectors are added by hand.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn

from trimtab.engines.transformers.calls import Call, generate_steered
from trimtab.engines.transformers.prompts import PromptBatch, pad
from trimtab.errors import SteeringError
from trimtab.instrument.hookmap import HookMap
from trimtab.instrument.layer_replay import evaluating
from trimtab.program import ResolvedSteering
from trimtab.sites import HookPoint, Phase, Site
from trimtab.spec import Steering

PROMPTS = ((1, 2, 3), (4, 5))
NEW_TOKENS = 3  # of which the first two are run: one pass of prompts, two of new tokens
SITE = Site(0, HookPoint.POST_BLOCK)
SIZE = 4.0  # of the vectors, in norms of the largest token
BOUND = 0.25  # of a vector's norm: a whole token of another place is more, rounding and padding are less


def check_places(model: Any, hook_map: HookMap, decoder: nn.Module, homes: Mapping[int, torch.device]) -> None:
    """Raise SteeringError unless a prefill-only and a decode-only vector act exactly where they should.

    Runs the model five times over a few tokens; random state, hooks and training mode are left as they were.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = len(model.get_input_embeddings().weight)
    batch = pad([[token % vocabulary for token in row] for row in PROMPTS], "left", 0, device)
    cuda = sorted({home.index for home in homes.values() if home.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda), evaluating(model):
            _check(model, hook_map, decoder, homes, batch)
    except SteeringError as error:
        reason = error.message if error.field == "model" else str(error)
        raise SteeringError("model", f"{type(model).__name__} cannot be steered by position: {reason}") from error
    except Exception as error:
        message = f"{type(model).__name__} failed in a short generation: {type(error).__name__}: {error}"
        raise SteeringError("model", message) from error


def _check(
    model: Any, hook_map: HookMap, decoder: nn.Module, homes: Mapping[int, torch.device], batch: PromptBatch
) -> None:
    prompt = _plain(hook_map, decoder, batch.input_ids, batch.attention_mask)
    vectors = _vectors(prompt[batch.attention_mask.cpu().bool()], hook_map.sites.hidden_size)
    parts = [
        {"kind": "add", "vector": {SITE.hook.value: {"0": vectors[phase].tolist()}}, "phase": phase.value}
        for phase in Phase
    ]
    steering = Steering.parse({"interventions": parts}).resolve({}, hook_map.sites, {})
    assert isinstance(steering, ResolvedSteering), "phases need no prompt"
    passes: list[torch.Tensor] = []

    @contextmanager
    def observe() -> Iterator[None]:
        with hook_map.installed({SITE: lambda value: passes.append(_rows(value, batch))}):
            yield

    call = Call(options=_greedy(model), pad_token=0)
    outputs, _ = generate_steered(model, hook_map, batch, [steering] * len(PROMPTS), call, homes=homes, observe=observe)

    width = batch.width
    new = torch.tensor([outputs.tokens(row)[: NEW_TOKENS - 1] for row in range(len(PROMPTS))])
    ids = torch.cat([batch.input_ids, new.to(batch.input_ids)], dim=1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(new).to(batch.attention_mask)], dim=1)
    expected = _plain(hook_map, decoder, ids, mask)
    expected[:, :width] += vectors[Phase.PREFILL]
    expected[:, width:] += vectors[Phase.DECODE]
    if len(passes) != NEW_TOKENS:
        raise SteeringError("model", f"{NEW_TOKENS} tokens took {len(passes)} passes through its first layer")
    for index, seen in enumerate(passes):
        end = width + index
        there = slice(max(end - seen.shape[1], 0), end)
        off = (seen - expected[:, there]).norm(dim=-1)[mask[:, there].cpu().bool()] / vectors[Phase.PREFILL].norm()
        if not bool((off <= BOUND).all()):
            what = "the prompts" if index == 0 else f"new token {index}"
            if bool((off <= 0.5).all()):  # no vector is missing or too much
                reason = (
                    "the first layer returns other numbers than in a plain pass: there is a prefix before the tokens"
                )
                raise SteeringError("model", f"{reason}, or it attends to later ones")
            raise SteeringError("model", f"steering did not act where it should in the pass over {what}")


def _plain(hook_map: HookMap, decoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the first layer returns for these tokens, [rows, columns, H] float32, in one pass without a cache."""
    seen: list[torch.Tensor] = []
    extra = {}
    if "position_ids" in signature(decoder.forward).parameters:
        extra["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad(), hook_map.installed({SITE: lambda value: seen.append(value.detach().float().cpu())}):
        decoder(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
    return seen[0].reshape(*ids.shape, -1).clone()


def _rows(value: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    return value.detach().float().cpu().reshape(len(batch.lengths), -1, value.shape[-1]).clone()


def _vectors(tokens: torch.Tensor, width: int) -> dict[Phase, torch.Tensor]:
    """A vector per phase, [H] float32, at right angles to each other and much longer than what is there."""
    size = SIZE * max(float(tokens.norm(dim=-1).max()), 1.0)
    noise = torch.randn(width, 2, generator=torch.Generator().manual_seed(0))
    columns = torch.linalg.qr(noise)[0] * size
    return {Phase.PREFILL: columns[:, 0], Phase.DECODE: columns[:, 1]}


def _greedy(model: Any) -> dict[str, Any]:
    """Options for a short greedy generation that overrule all that the model sets for itself."""
    ours = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    own = {name: None for name, value in vars(model.generation_config).items() if value is not None and name[0] != "_"}
    return {**own, "use_cache": True, "eos_token_id": None, **ours}
