"""The whole model's part of the proof: one residual stream, its tokens in place, and additions that arrive in full.

All of it is seen on a batch of two prompts of different lengths (`probe.run_probe`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument.layer_replay import (
    PROBE_END,
    PROBE_ROWS,
    PROBE_TOKENS,
    LayerCall,
    record_layer_calls,
    run_probe,
)
from trimtab.instrument.taps import Transform
from trimtab.instrument.weights import holds_packed
from trimtab.sites import HookPoint, Site, site_order

# How far other rows may move, of what moves most: they share the shape of an expert's product, or, where activations
# are quantised as a model runs, a scale. A mix-up moves one of them instead of the token that was changed.
APART, APART_QUANTISED = 0.05, 0.75

BRANCHES = (HookPoint.ATTN_OUT, HookPoint.MLP_OUT)
SUMS = (  # what must add up in every layer that has all of it
    ((HookPoint.PRE_ATTN, HookPoint.ATTN_OUT), HookPoint.POST_ATTN),
    ((HookPoint.POST_ATTN, HookPoint.MLP_OUT), HookPoint.POST_BLOCK),
)
BESIDE = ((HookPoint.PRE_ATTN, *BRANCHES), HookPoint.POST_BLOCK)  # without a stream between the branches

Installed = Callable[[Mapping[Site, Transform]], AbstractContextManager[None]]
"""Hooks a transform onto each site while the context lasts."""


def check_stream(calls: Sequence[LayerCall], hidden_size: int) -> None:
    """Raise SteeringError unless the layers hand on one tensor [rows, columns, hidden size], each to the next."""
    wanted = (PROBE_ROWS, PROBE_TOKENS, hidden_size)
    for index, call in enumerate(calls):
        if (shape := tuple(call.entering.shape)) != wanted or call.leaving.shape != call.entering.shape:
            other = shape if shape != wanted else tuple(call.leaving.shape)
            raise SteeringError(
                "model", f"layer {index} {'takes' if shape != wanted else 'returns'} {_told(other, wanted)}"
            )
        if index and not torch.equal(call.entering.cpu(), calls[index - 1].leaving.cpu()):
            raise SteeringError("model", f"layer {index} is not given what layer {index - 1} returns")


def check_places(
    model: nn.Module, layers: Sequence[nn.Module], sites: frozenset[Site], installed: Installed
) -> dict[Site, str]:
    """Raise SteeringError unless each site holds one vector per token, those of a row in order and rows apart; and
    unless post_attn + mlp_out = post_block in every layer that has both.

    Returned are branches that do not make up, with the stream entering their layer, what follows them, and why.

    The last token of the shorter prompt is exchanged for another: it, and what may follow it, has to be all that moves.
    """
    apart = _apart(layers)
    base, other = (_read(model, sites, installed, token) for token in (5, 6))
    for site in sorted(sites, key=site_order):
        moved = _check_moved(base[site], other[site], f"{site}: ", apart)
        if site.hook in (HookPoint.PRE_ATTN, HookPoint.POST_BLOCK) and not moved:
            raise SteeringError(str(site), "what is there does not follow its token")
    full, changed = (run_probe(model, token, padded=False) for token in (5, 6))
    _check_moved(full, changed, "without padding, ", apart)
    amiss: dict[Site, str] = {}
    for layer in range(len(layers)):
        for terms, result in SUMS if Site(layer, HookPoint.POST_ATTN) in sites else [BESIDE]:
            around = [Site(layer, hook) for hook in (*terms, result)]
            if not base.keys() >= set(around) or _adds_up([base[site] for site in around]):
                continue
            told = f"{' + '.join(terms)} is not {result} in this layer"
            if HookPoint.ATTN_OUT not in terms:
                raise SteeringError(str(around[0]), told)
            amiss |= {site: told for site in around if site.hook in BRANCHES}
    return amiss


def _adds_up(values: Sequence[torch.Tensor]) -> bool:
    """Whether the last of the tensors is the sum of the others, but for rounding."""
    *parts, whole = (value.double() for value in values)
    bound = 2 * torch.finfo(values[0].dtype).eps * sum((part.abs() for part in parts), whole.abs())
    return bool(((sum(parts) - whole).abs() <= bound).all())


def check_additions(
    model: nn.Module,
    layers: Sequence[nn.Module],
    calls: Sequence[LayerCall],
    sites: frozenset[Site],
    installed: Installed,
) -> None:
    """Raise SteeringError unless what is added to one token arrives once and at full size in what the next layer reads,
    and moves that token's result, perhaps later ones', and no other.

    `calls` are those of an unsteered pass, which say how large the stream is.
    """
    noise = torch.randn(calls[0].entering.shape[-1], generator=torch.Generator().manual_seed(1))

    def addition(value: torch.Tensor, layer: int) -> torch.Tensor:
        row = noise.to(value) * calls[layer].entering.float().std().clamp_min(1e-3).to(value)
        places = value.clone().view(PROBE_ROWS, PROBE_TOKENS, -1)
        places[1, PROBE_END] += row
        return places.view(value.shape)

    def adding(site: Site) -> Transform:
        return lambda value: addition(value, site.layer)

    results: list[torch.Tensor] = []

    def steered() -> None:
        with installed({site: adding(site) for site in sites}):
            results.append(run_probe(model))

    seen = record_layer_calls(layers, steered)
    for index in range(1, len(layers)):
        wanted = addition(seen[index - 1].leaving, index - 1)
        if not torch.equal(seen[index].entering.cpu(), wanted.cpu()):
            raise SteeringError("model", f"what is added after layer {index - 1} does not arrive in layer {index}")
    if not _check_moved(run_probe(model), results[0], "", _apart(layers)):
        raise SteeringError("model", "what is added to its layers does not change its result")


def _read(model: nn.Module, sites: frozenset[Site], installed: Installed, last_token: int) -> dict[Site, torch.Tensor]:
    seen: dict[Site, torch.Tensor] = {}

    def reader(site: Site) -> Transform:
        def read(value: torch.Tensor) -> None:
            seen[site] = value.detach().cpu().clone().view(PROBE_ROWS, PROBE_TOKENS, -1)

        return read

    with installed({site: reader(site) for site in sites}):
        run_probe(model, last_token)
    return seen


def _check_moved(before: torch.Tensor, after: torch.Tensor, where: str, apart: float) -> bool:
    """Whether the last token of the shorter row moved; raise SteeringError where a token moved that must not."""
    far = (after.double() - before.double()).abs().amax(-1)
    noise = 10 * far[0].max() + 16 * torch.finfo(before.dtype).eps * before.double().abs().max()
    if bool(far[0].max() > apart * far.max()):
        raise SteeringError("model", f"{where}its layers do not keep prompts apart: one changes another's tokens")
    if bool(far[1, :PROBE_END].max() > noise):
        raise SteeringError("model", f"{where}it attends to later tokens: what one is changes those before it")
    return bool(far[1, PROBE_END] > 0)


def _apart(layers: Sequence[nn.Module]) -> float:
    floats = [weight.is_floating_point() for layer in layers for weight in layer.parameters() if weight.dim() >= 2]
    return APART if floats and all(floats) and not any(map(holds_packed, layers)) else APART_QUANTISED


def _told(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A shape, and what it means."""
    rows, columns, width = wanted
    size, one = torch.Size(shape).numel(), rows * columns * width
    if shape == (columns, rows, width):
        return f"{shape}, columns first: only layers that take [rows, columns, {width}] can be steered"
    if shape[::2] == wanted[::2]:
        return f"{shape} for {rows} rows of {columns} tokens: it adds tokens of its own (as prompt tuning does)"
    if size > one and size % one == 0:
        return (
            f"{shape} for {rows} rows of {columns} tokens: {size // one} residual streams, none of which is the model's"
        )
    return f"{shape} for {rows} rows of {columns} tokens, not one stream [{rows}, {columns}, {width}]"
