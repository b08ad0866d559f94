"""Find a causal language model's decoder layers by structure: no list of model names.

The layers are the `nn.ModuleList` on the path of the text decoder whose length is the text configuration's
`num_hidden_layers`. Vision towers, audio encoders, experts and per-layer side tables are passed over.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument.weights import has_matrix

ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of one model: `layers[L]` is layer L, `path` is the list's name inside the model."""

    layers: nn.ModuleList
    path: str
    hidden_size: int

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers)


def find_decoder_layers(model: nn.Module, config: Any = None) -> DecoderLayers:
    """The decoder layers of `model`.

    `config` is the text configuration (attributes `num_hidden_layers` and `hidden_size`); by default the model's own.
    Layers that a pipeline stage does not hold may be placeholders: the list keeps its full length.
    Raises SteeringError where the model has an encoder, or where no list or more than one fits.
    """
    config = text_config(model) if config is None else config
    if getattr(config, "is_encoder_decoder", False):
        raise SteeringError("model", f"{type(model).__name__} has an encoder; only decoder-only models can be steered")
    depth, width = int(config.num_hidden_layers), int(config.hidden_size)
    lists = next((found for root in _roots(model) if (found := _layer_lists(root, depth))), [])
    if len(lists) != 1:
        where = ", ".join(repr(_path_of(model, found)) for found in lists) or "none"
        raise SteeringError(
            "model",
            f"{type(model).__name__}: expected one nn.ModuleList of {depth} decoder layers (num_hidden_layers), "
            f"found {len(lists)} ({where})",
        )
    return DecoderLayers(layers=lists[0], path=_path_of(model, lists[0]), hidden_size=width)


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder: that of the model itself, or the nested one of a multimodal model."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise SteeringError("model", f"{type(model).__name__} has no `config`; a Transformers causal LM is expected")
    nested = getattr(config, "get_text_config", None)
    return nested(decoder=True) if nested is not None else config


def _roots(model: nn.Module) -> Iterator[nn.Module]:
    """Where to look: in the text decoder, if the model names one, so that towers beside it are passed over; then in
    all of it, since what some models call their decoder is the head behind it."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    root = get_decoder() if callable(get_decoder) else None
    if isinstance(root, nn.Module):
        yield root
    yield model


def _layer_lists(root: nn.Module, depth: int) -> list[nn.ModuleList]:
    known = list(_outermost_lists(root, depth))
    lists = [found for found in known if any(_is_block(layer) for layer in found)]
    if not lists:  # weights that nobody can see
        lists = [found for found in known if any(_attends_by_name(layer) for layer in found)]
    named = {tuple(map(id, found)): found for found in reversed(lists)}  # one list under two names is one
    lists = [*named.values()][::-1]
    if len(lists) > 1:  # lists of norms or adapters may share the length; decoder layers attend
        lists = [found for found in lists if any(_attends(layer) for layer in found)]
    return lists


def _outermost_lists(module: nn.Module, length: int) -> Iterator[nn.ModuleList]:
    if isinstance(module, nn.ModuleList) and len(module) == length:
        yield module
        return
    for child in module.children():
        yield from _outermost_lists(child, length)


def _is_block(layer: nn.Module) -> bool:
    return has_matrix(layer) and sum(1 for _ in layer.children()) >= 2


def _attends_by_name(layer: nn.Module) -> bool:
    return any(ATTENTION_NAME.search(name) for name, _ in layer.named_children())


def _attends(layer: nn.Module) -> bool:
    return any(ATTENTION_NAME.search(name) and has_matrix(child) for name, child in layer.named_children())


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "?")
