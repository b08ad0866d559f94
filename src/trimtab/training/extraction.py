"""Steering vectors from contrastive prompts: the difference between the means of two sets of activations.

Known as contrastive activation addition (Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition",
arXiv:2312.06681): at each site, the mean over the positive prompts less the mean over the negative ones. Whether such a
vector steers, where and how strongly, is what `trimtab.training.tune_vector` finds out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.training.parts import check_disjoint
from trimtab.vectors.content import VectorMetadata, model_name
from trimtab.vectors.dose import stream_norm_key, stream_site
from trimtab.vectors.vector import SteeringVector

if TYPE_CHECKING:  # torch is loaded by whoever has a model, not by this module
    from trimtab.engines.transformers import SteeredModel

TokenChoice = Literal["last", "mean"]
LEAST_DIFFERENCE = 1e-5  # of the activations' own norm: float32 itself makes a millionth


@dataclass(frozen=True)
class Readings:
    """What prompts look like at some sites: each as one vector, and how long the stream's own vectors are."""

    sites: tuple[Site, ...]
    values: npt.NDArray[np.float32]  # [prompts, sites, H]
    stream_norms: dict[Site, float]  # median over tokens, the first of each prompt left out

    def projected(self, site: Site, direction: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """[prompts]: the part of each prompt along the unit vector of `direction` at `site`."""
        unit = direction.astype(np.float64) / np.linalg.norm(direction.astype(np.float64))
        return np.asarray(self.values[:, self.sites.index(site)].astype(np.float64) @ unit)


def extract_vector(
    model: "SteeredModel",
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    hook_point: HookPoint | str = HookPoint.POST_BLOCK,
    token: TokenChoice = "mean",
    batch_size: int = 8,
    progress: bool = True,
) -> SteeringVector:
    """The mean activation of `positive` less that of `negative`, at each of `layers` (all by default), as it is.

    Each prompt counts once: as its last token, or as the mean over its tokens. The two lists may differ in length.
    Sums are taken in float64. The metadata hold the median norm of the stream at each site. Raises SteeringError for an
    empty list, for a prompt in both, for lists whose means are the same, for activations that are not finite, and for a
    layer or hook point that the model does not have.
    """
    sites = wanted_sites(model, layers, hook_point)
    check_prompts(positive, negative, token, batch_size)
    everything = [*positive, *negative]
    readings = read(model, everything, sites, token=token, batch_size=batch_size, progress=progress)
    labels = np.arange(len(everything)) < len(positive)
    return difference(model, readings, labels, token)


def wanted_sites(model: "SteeredModel", layers: Iterable[int] | None, hook_point: HookPoint | str) -> list[Site]:
    """The sites of `layers`, all by default. Raises SteeringError for none, and for an unknown hook point."""
    if hook_point not in set(HookPoint):
        raise SteeringError("hook_point", f"got {hook_point!r}; want one of {', '.join(HookPoint)}")
    wanted = range(model.sites.num_layers) if layers is None else sorted(set(layers))
    if not (sites := [Site(layer, HookPoint(hook_point)) for layer in wanted]):
        raise SteeringError("layers", "no layer is given")
    for site in sites:
        if not 0 <= site.layer < model.sites.num_layers:
            raise SteeringError(
                str(site), f"layer {site.layer} does not exist; the model has layers 0 to {model.sites.num_layers - 1}"
            )
    return sites


def check_prompts(positive: Sequence[str], negative: Sequence[str], token: str, batch_size: int) -> None:
    """Raise SteeringError for lists that no vector can come from."""
    if token not in ("last", "mean"):
        raise SteeringError("token", f"got {token!r}; want 'last' or 'mean'")
    for name, prompts in (("positive", positive), ("negative", negative)):
        if isinstance(prompts, str) or not prompts:
            raise SteeringError(name, "want a list of one or more prompts")
    check_disjoint(positive, negative)
    if batch_size < 1:
        raise SteeringError("batch_size", f"got {batch_size}; want 1 or more")


def read(
    model: "SteeredModel",
    prompts: Sequence[str],
    sites: Sequence[Site],
    *,
    token: TokenChoice,
    batch_size: int,
    progress: bool,
) -> Readings:
    """Read `prompts` at `sites`. Raises SteeringError for activations that are not finite."""
    streams = {site: stream_site(site, model.sites.sites) for site in sites}
    needed = list(dict.fromkeys([*sites, *streams.values()]))
    values = np.empty((len(prompts), len(sites), model.sites.hidden_size), np.float32)
    norms: dict[Site, list[npt.NDArray[np.floating]]] = {site: [] for site in sites}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("reading activations", total=len(prompts))
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            for place, arrays in enumerate(model.activations(part, needed, batch_size=batch_size), start):
                for column, site in enumerate(sites):
                    if not np.isfinite(arrays[site]).all():
                        raise SteeringError(
                            "model", f"its activations at {site} are not finite for the prompt {prompts[place]!r:.60}"
                        )
                    values[place, column] = _choose(arrays[site], token)
                    stream = arrays[streams[site]].astype(np.float64)
                    norms[site].append(np.linalg.norm(stream[1:] if len(stream) > 1 else stream, axis=1))
            bar.advance(task, len(part))
    return Readings(tuple(sites), values, {site: float(np.median(np.concatenate(norms[site]))) for site in sites})


def difference(
    model: "SteeredModel", readings: Readings, positive: npt.NDArray[np.bool_], token: TokenChoice
) -> SteeringVector:
    """The mean of the `positive` readings less that of the others. Raises SteeringError where there is none."""
    halves = [readings.values[chosen].mean(axis=0, dtype=np.float64) for chosen in (positive, ~positive)]
    found = halves[0] - halves[1]
    for site, row, size in zip(readings.sites, found, np.linalg.norm(halves[1], axis=1), strict=True):
        if np.linalg.norm(row) <= LEAST_DIFFERENCE * size:
            raise SteeringError(
                "negative",
                f"its prompts look like the positive ones at {site} (token {token!r}): their difference is zero; "
                "give prompts that differ, or other layers",
            )
    site_norms = {stream_norm_key(site): f"{norm:.6g}" for site, norm in readings.stream_norms.items()}
    count = int(positive.sum())
    metadata = VectorMetadata(
        base_model=model_name(model.model.config),
        method="mean difference",
        source=f"{count} positive and {len(positive) - count} negative prompts",
        extra={
            "hook_point": readings.sites[0].hook.value,
            "token": token,
            "positive_count": str(count),
            "negative_count": str(len(positive) - count),
            **site_norms,
        },
    )
    return SteeringVector.from_block(list(readings.sites), found, metadata)


def _choose(tokens: npt.NDArray[np.float32], choice: TokenChoice) -> npt.NDArray[np.float64]:
    """One [H] vector of a prompt's [tokens, H]."""
    return np.asarray(tokens[-1] if choice == "last" else tokens.mean(axis=0, dtype=np.float64), np.float64)
