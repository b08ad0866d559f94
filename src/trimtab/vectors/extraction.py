"""Steering vectors from contrastive prompts: the difference between the means of two sets of activations.

Known as contrastive activation addition (Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition",
arXiv:2312.06681): at each site, the mean over the positive prompts less the mean over the negative ones.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector, VectorMetadata

if TYPE_CHECKING:  # torch is loaded by whoever has a model, not by this module
    from trimtab.engines.transformers import SteeredModel

TokenChoice = Literal["last", "mean"]


def extract_vector(
    model: "SteeredModel",
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    hook_point: HookPoint | str = HookPoint.POST_BLOCK,
    token: TokenChoice = "last",
    batch_size: int = 8,
    progress: bool = True,
) -> SteeringVector:
    """The mean activation of `positive` less that of `negative`, at each of `layers` (all by default).

    Each prompt counts once: as its last token, or as the mean over its tokens. The two lists may differ in length.
    Sums are taken in float64. Raises SteeringError for an empty list, and for a layer or hook point that the model does
    not have.
    """
    if token not in ("last", "mean"):
        raise SteeringError("token", f"got {token!r}; want 'last' or 'mean'")
    if hook_point not in set(HookPoint):
        raise SteeringError("hook_point", f"got {hook_point!r}; want one of {', '.join(HookPoint)}")
    for name, prompts in (("positive", positive), ("negative", negative)):
        if isinstance(prompts, str) or not prompts:
            raise SteeringError(name, "want a list of one or more prompts")
    if batch_size < 1:
        raise SteeringError("batch_size", f"got {batch_size}; want 1 or more")
    wanted = range(model.sites.num_layers) if layers is None else sorted(set(layers))
    sites = [Site(layer, HookPoint(hook_point)) for layer in wanted]
    if not sites:
        raise SteeringError("layers", "no layer is given")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("reading activations", total=len(positive) + len(negative))

        def mean(prompts: Sequence[str]) -> npt.NDArray[np.float64]:
            total = np.zeros((len(sites), model.sites.hidden_size))
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                for arrays in model.activations(part, sites, batch_size=batch_size):
                    total += np.stack([_choose(arrays[site], token) for site in sites])
                bar.advance(task, len(part))
            return total / len(prompts)

        difference = mean(positive) - mean(negative)
    metadata = VectorMetadata(
        base_model=str(getattr(model.model.config, "_name_or_path", "")),
        method="mean difference",
        source=f"{len(positive)} positive and {len(negative)} negative prompts",
        extra={
            "hook_point": HookPoint(hook_point).value,
            "token": token,
            "positive_count": str(len(positive)),
            "negative_count": str(len(negative)),
        },
    )
    return SteeringVector.from_block(sites, difference, metadata)


def _choose(tokens: npt.NDArray[np.float32], choice: TokenChoice) -> npt.NDArray[np.float64]:
    """One [H] vector of a prompt's [tokens, H]."""
    return np.asarray(tokens[-1] if choice == "last" else tokens.mean(axis=0, dtype=np.float64), np.float64)
