"""Un-steered activations: one pass over a batch, looked into at some sites."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trimtab.engines.transformers.prompts import PromptBatch
from trimtab.instrument.hookmap import HookMap
from trimtab.instrument.layer_replay import evaluating
from trimtab.sites import Site


def read_batch(
    model: nn.Module, decoder: nn.Module, hook_map: HookMap, batch: PromptBatch, sites: Sequence[Site]
) -> list[dict[Site, npt.NDArray[np.float32]]]:
    """For each row of a batch that is padded on the right: for every site an array [tokens, H], padding removed."""
    seen: dict[Site, npt.NDArray[np.float32]] = {}

    def reader(site: Site) -> Callable[[torch.Tensor], None]:
        def read(value: torch.Tensor) -> None:
            rows = value.detach().to("cpu", torch.float32).numpy().copy()
            seen[site] = rows.reshape(*batch.input_ids.shape, -1)

        return read

    with evaluating(model), torch.no_grad(), hook_map.installed({site: reader(site) for site in sites}):
        decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return [{site: seen[site][row, :length].copy() for site in sites} for row, length in enumerate(batch.lengths)]


def decoder_of(model: Any, layers_path: str) -> nn.Module:
    """The smallest part of a model that turns token ids into what its layers return; the layers stand at a path."""
    path = layers_path
    while path:
        path = path.rpartition(".")[0]
        module: nn.Module = model.get_submodule(path)
        if "input_ids" in signature(module.forward).parameters:
            return module
    whole: nn.Module = model
    return whole
