"""Where a decoder layer is given the residual stream and where it returns it, seen from outside, by hooks.

Only for passes in which Python runs: a graph that was traced without hooks does not call them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.engines.vllm.worker.conventions import Convention, convention_of
from trimtab.engines.vllm.worker.layers import Slot, argument, stream_slots, with_argument

Rows = list[int]  # of the tokens that a hook is for


@dataclass(frozen=True)
class LayerBoundary:
    """A layer, and the places of the stream among its arguments and results."""

    layer: nn.Module
    name: str  # of its class, before it was exchanged
    convention: Convention
    hidden: Slot
    residual: Slot | None

    @classmethod
    def of(cls, layer: nn.Module) -> "LayerBoundary":
        """To be made before the layer's class is exchanged, which takes its source and signature out of sight."""
        kind = type(layer)
        return cls(layer, kind.__name__, convention_of(kind), *stream_slots(kind))

    def read_behind(
        self, following: "LayerBoundary | None", rows: Rows, keep: Callable[[Tensor], None]
    ) -> RemovableHandle:
        """Hand `keep` the stream [rows, H] float32 that this layer hands on: what `following` is given, or, without
        one, what this layer returns. Where no stream is found, nothing is handed."""
        split = self.convention is Convention.SPLIT

        def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert following is not None
            parts = [argument(args, kwargs, following.hidden)]
            if split:
                if following.residual is None:
                    return
                parts.append(argument(args, kwargs, following.residual))
            _keep_sum(parts, rows, keep)

        def returned(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            parts = out if isinstance(out, (tuple, list)) else (out,)
            _keep_sum(parts[: 2 if split else 1], rows, keep)

        if following is None:
            return self.layer.register_forward_hook(returned)
        return following.layer.register_forward_pre_hook(given, with_kwargs=True)

    def add_before(self, row: int, addition: Tensor) -> RemovableHandle:
        """Add `addition` [H] to one token of the stream that this layer is given."""

        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            slot = self.hidden
            if self.convention is Convention.SPLIT and self.residual is not None:
                # The first layer of a model is given no residual yet: its hidden states are the stream.
                slot = slot if argument(args, kwargs, self.residual) is None else self.residual
            stream = argument(args, kwargs, slot)
            if not isinstance(stream, Tensor) or stream.shape[-1] != len(addition):
                return None
            moved = stream.clone(memory_format=torch.contiguous_format)
            tokens = moved.view(-1, len(addition))
            if row < len(tokens):
                tokens[row] += addition.to(moved)
            return with_argument(args, kwargs, slot, moved)

        return self.layer.register_forward_pre_hook(add, with_kwargs=True)


def _keep_sum(parts: Any, rows: Rows, keep: Callable[[Tensor], None]) -> None:
    """The sum of the parts that are there. Tokens that are spread over ranks are too few here: there is no reading."""
    tensors = [part for part in parts if part is not None]
    if not tensors or not all(isinstance(part, Tensor) and part.dim() >= 2 for part in tensors):
        return
    tokens = [part.reshape(-1, part.shape[-1]) for part in tensors]
    if all(max(rows) < len(part) for part in tokens):
        keep(torch.stack([part[rows].float() for part in tokens]).sum(0))
