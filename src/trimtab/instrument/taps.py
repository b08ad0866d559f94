"""Taps: where in a layer's modules a hook point's tensor passes, and the hooks that read or rewrite it there.

Three ways to reach a tensor suffice for every family:

- a module's *input*: what that module alone receives (a fresh tensor is passed instead);
- a module's *output*: what everyone after it receives;
- a module's input *in place*: the tensor itself is overwritten. The stream after the attention add needs this. A
  pre-norm layer keeps `residual = hidden_states` and then calls the norm on the same tensor: replacing the norm's
  argument would reach the MLP and miss the residual, overwriting the tensor reaches both, is rounded once, and serves
  any kind of intervention, since what is read is the true stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Transform = Callable[[torch.Tensor], torch.Tensor | None]
"""Receives the tensor at a tap ([..., H], not to be written to); returns its replacement of the same shape, or None
to leave it."""


@dataclass(frozen=True)
class Tap:
    """`path` names a sub-module relative to the decoder layer ("" is the layer itself)."""

    path: str
    side: Literal["input", "output"]
    in_place: bool = False

    def install(self, layer: nn.Module, transform: Transform) -> RemovableHandle:
        """Hook `transform` onto this tap of `layer`; `.remove()` of the handle restores the module exactly."""
        module = layer.get_submodule(self.path)
        if self.side == "output":
            return module.register_forward_hook(_output_hook(transform))
        return module.register_forward_pre_hook(_input_hook(transform, self.in_place), with_kwargs=True)


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a call's arguments: the first positional one, or the first tensor passed by name."""
    value = args[0] if args else kwargs.get("hidden_states")
    if value is None:
        value = next((item for item in kwargs.values() if isinstance(item, torch.Tensor)), None)
    if not isinstance(value, torch.Tensor):
        raise TypeError("no hidden states among the module's arguments")
    return value


def replace_hidden_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: torch.Tensor, new: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with the hidden states `old` (found by `hidden_argument`) exchanged for `new`."""
    if args:
        return (new, *args[1:]), kwargs
    return args, {name: new if value is old else value for name, value in kwargs.items()}


def hidden_output(output: Any) -> torch.Tensor:
    """The hidden states among a module's results: the tensor itself, or the first of a tuple."""
    value = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected a tensor or a tuple that starts with one, got {type(value).__name__}")
    return value


def replace_hidden_output(output: Any, new: torch.Tensor) -> Any:
    """The same results with the hidden states exchanged for `new`."""
    if not isinstance(output, (tuple, list)):
        return new
    made = (new, *output[1:])
    return type(output)(*made) if hasattr(output, "_fields") else type(output)(made)  # a named tuple takes them singly


def _output_hook(transform: Transform) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        new = transform(hidden_output(output))
        return None if new is None else replace_hidden_output(output, new)

    return hook


def _input_hook(transform: Transform, in_place: bool) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        old = hidden_argument(args, kwargs)
        new = transform(old)
        if new is None:
            return None
        if in_place:
            old.copy_(new)
            return None
        return replace_hidden_argument(args, kwargs, old, new)

    return hook
