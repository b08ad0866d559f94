"""The start-up measurement: what is added at a site arrives once, at full size, in what the next layer reads.

The canary shows that an addition has an effect, but one of half the size has an effect, too. So a pattern u is added
to a token at two strengths, s and 4 s, and the streams x behind the layer are compared:

    factor = (x(4 s) - x(s)) . u / (3 s |u|^2)

What the layer's own branches answer drops out. They read the stream through a norm, to which an addition that outweighs
all else is the same at both strengths; what does not drop out shows across the pattern, and then there is no reading.
The factor has to be 1 at

- `post_block`, `mlp_out`, `post_attn` and `attn_out`: each is added to the stream itself;
- each layer that hands on the stream in two parts, up to the last that is steered: an addition that a hook makes to
  what the layer is given passes through it. vLLM scales such a stream to keep it in float16's range, and then it is
  not the model's. A layer that returns one whole stream may scale it, or norm it, by its own definition.

At `pre_attn` it has to be what the layer does with that hook's addition. `mlp_in` never enters the stream.

The passes run without compiled code and without graphs, so that hooks are called. Where there is no reading, nothing
is refused: a healthy engine that does not start is worse than one that was not measured.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.boundaries import LayerBoundary
from trimtab.engines.vllm.worker.conventions import Convention
from trimtab.engines.vllm.worker.dummy_passes import Forward, dummy_forward, is_compiled_whole, uncompiled
from trimtab.engines.vllm.worker.startup_check import canaries, canary_pattern
from trimtab.errors import SteeringError
from trimtab.ops.host import awake
from trimtab.sites import HookPoint, Site

_WEAK = 64.0  # times the stream's own root mean square, or 1 if that is smaller
_STEP = 4.0
_RANGE = (2.0**15, 2.0**26)  # what 4 s u may reach: half of float16's range, and far below that of the others
_CLEAR = 0.2  # of the expected difference: how much of it may lie across the pattern
_MEASURED = frozenset(HookPoint) - {HookPoint.MLP_IN}
_TOKENS = 64  # of a pass at most

Factors = dict[Any, float]  # by site or layer; those without a reading are left out
_Adding = AbstractContextManager[None]

logger = logging.getLogger("vllm.trimtab")


def require_full_size(worker: Any, attachment: Attachment, is_v2: bool) -> None:
    """Raise `SteeringError` naming each site of this rank at which what is added arrives at another size, and each
    layer that hands on another multiple of the stream. Leaves the buffers as new.
    """
    layers, buffers = attachment.layers, attachment.buffers
    sites = [site for site in buffers.sites if site.hook in _MEASURED and site.layer in layers]
    if not sites:
        return
    model = worker.model_runner.get_model()
    if is_compiled_whole(model):
        logger.debug("How much of an addition arrives was not measured: the model is one compiled function")
        return
    last = max(site.layer for site in sites)
    steered_in = {site.layer for site in sites if site.hook is HookPoint.PRE_ATTN}
    through = [
        index for index, layer in sorted(layers.items()) if index in steered_in or _is_judged(layer, index, last)
    ]
    passing: Factors = {}
    arriving: Factors = {}
    try:
        forward = dummy_forward(worker, is_v2, eager=True)
        with awake(buffers.states), uncompiled(model):
            most = min(_TOKENS, int(worker.vllm_config.scheduler_config.max_num_batched_tokens))
            passing = _measured(forward, attachment, through, most, _added_by_hooks)
            arriving = _measured(forward, attachment, sites, min(most, buffers.table.shape[1] - 1), _added_at_sites)
    except Exception:  # whatever a model does in a mode that it is not served in, it may serve in its own
        logger.debug("How much of an addition arrives was not measured: the passes for it failed", exc_info=True)
    bound = tolerance(buffers.table.dtype)
    _require_arriving(arriving, passing, bound)
    _require_passing({i: f for i, f in passing.items() if _is_judged(layers[i], i, last)}, layers, bound)
    if skipped := [str(subject) for subject in (*through, *sites) if subject not in {**passing, **arriving}]:
        logger.debug("How much of an addition arrives was not measured at %s", ", ".join(skipped))


def tolerance(dtype: torch.dtype) -> float:
    """How far a factor may be from 1: 3 % for what branches answer, and what three roundings of the stream (behind the
    attention, the MLP and our addition) do at worst, each half an eps of s and of 4 s."""
    return 0.03 + 3 * (1 + _STEP) / (_STEP - 1) * torch.finfo(dtype).eps / 2


def _is_judged(layer: LayerBoundary, index: int, last: int) -> bool:
    return layer.convention is Convention.SPLIT and index <= last


def _require_passing(factors: Factors, layers: dict[int, LayerBoundary], bound: float) -> None:
    wrong = {index: factor for index, factor in factors.items() if abs(factor - 1) > bound}
    if wrong:
        names = ", ".join(dict.fromkeys(layers[index].name for index in wrong))
        found = ", ".join(f"layer {index} hands on {factor:.3g} times the stream" for index, factor in wrong.items())
        raise SteeringError(
            "model",
            f"layers of class {names} cannot be steered: {found} that it is given, so what is added would be of "
            "another size than the model's own stream",
        )


def _require_arriving(arriving: Factors, passing: Factors, bound: float) -> None:
    wrong = {}
    for site, factor in arriving.items():
        whole = passing.get(site.layer, math.nan) if site.hook is HookPoint.PRE_ATTN else 1.0
        if abs(whole) > 0.1 and abs(factor / whole - 1) > bound:  # a layer that norms its stream keeps no size
            wrong[site] = factor / whole
    if wrong:
        found = ", ".join(f"{site} ({factor:.3g} times)" for site, factor in wrong.items())
        raise SteeringError(
            "steering",
            f"what is added arrives at another size in what the next layer reads, at {found}: this engine would answer "
            "steered more or less than asked and does not start. This is a fault of trimtab with this model and "
            "version of vLLM; please report it",
        )


def _measured(
    forward: Forward, attachment: Attachment, subjects: Sequence[Any], most: int, adding: Callable[..., _Adding]
) -> Factors:
    """The factors of sites or layers, `most` in a pass. `adding` takes those of a pass and their strengths."""
    factors: Factors = {}
    for start in range(0, len(subjects), most):
        chunk = subjects[start : start + most]
        layers = [subject.layer if isinstance(subject, Site) else subject for subject in chunk]
        found = _factors(forward, attachment, layers, partial(adding, attachment, chunk)).tolist()
        factors |= {subject: factor for subject, factor in zip(chunk, found, strict=True) if math.isfinite(factor)}
    return factors


def _factors(
    forward: Forward,
    attachment: Attachment,
    layers: Sequence[int],
    adding: Callable[[Tensor], _Adding],
) -> Tensor:
    """For each token [n], how much of what `adding` adds to it arrives behind its layer; nan without a reading.

    `adding` takes the strengths [n] of the tokens.
    """
    table = attachment.buffers.table
    quiet = streams(forward, attachment, layers)
    size = quiet.square().mean(dim=-1).sqrt().nan_to_num(nan=1.0).clamp(min=1.0)
    most = (_RANGE[0] if table.dtype == torch.float16 else _RANGE[1]) / _STEP
    weak = (_WEAK * size.log2().ceil().exp2()).clamp(max=most)  # powers of two, which every dtype holds
    loud = []
    for strength in (weak, _STEP * weak):
        with adding(strength):
            loud.append(streams(forward, attachment, layers))
    pattern = canary_pattern(table.shape[2]).to(quiet)
    moved = (loud[1] - loud[0]) / ((_STEP - 1) * weak)[:, None]
    factors = moved @ pattern / pattern.square().sum()
    across = (moved - factors[:, None] * pattern).norm(dim=-1) / pattern.norm()
    return torch.where(across < _CLEAR, factors, math.nan)


def streams(forward: Forward, attachment: Attachment, layers: Sequence[int]) -> Tensor:
    """One pass: of each token the stream behind its layer, [n, H] float32; nan where none was seen."""
    table = attachment.buffers.table
    seen = torch.full((len(layers), table.shape[2]), math.nan, device=table.device)
    with ExitStack() as hooks:
        for layer in sorted(set(layers)):
            rows = [row for row, of in enumerate(layers) if of == layer]

            def keep(stream: Tensor, rows: list[int] = rows) -> None:
                if stream.shape[-1] == seen.shape[-1]:
                    seen[rows] = stream

            boundary, following = attachment.layers[layer], attachment.layers.get(layer + 1)
            hooks.callback(boundary.read_behind(following, rows, keep).remove)
        forward(max(len(layers), 2))
    return seen


def _added_at_sites(attachment: Attachment, sites: Sequence[Site], strengths: Tensor) -> _Adding:
    """Steer token i at the i-th of `sites`."""
    buffers = attachment.buffers
    return canaries(buffers, [buffers.sites.index(site) for site in sites], strengths)


@contextmanager
def _added_by_hooks(attachment: Attachment, layers: Sequence[int], strengths: Tensor) -> Iterator[None]:
    """Add the pattern to token i of what the i-th of `layers` is given."""
    pattern = canary_pattern(attachment.buffers.table.shape[2]).to(strengths)
    with ExitStack() as hooks:
        for row, (layer, strength) in enumerate(zip(layers, strengths, strict=True)):
            hooks.callback(attachment.layers[layer].add_before(row, strength * pattern).remove)
        yield
