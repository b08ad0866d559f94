"""Run one decoder layer again, on a recorded call, with parts of it silenced or replaced.

This is how the conventions of a layer are found and checked by numbers: what its output does when the attention or the
MLP is forced to a known value says where the additions are, whatever the modules are called.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trimtab.instrument.taps import Tap, Transform, hidden_argument, hidden_output

PROBE_TOKENS = 4


@dataclass(frozen=True)
class LayerCall:
    """One call of a decoder layer: its arguments, and copies of the hidden states that went in and came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entering: torch.Tensor
    leaving: torch.Tensor


@dataclass(frozen=True)
class ChildCall:
    """One call of a direct child of the layer during a replay, with copies of its hidden input and output."""

    name: str
    entering: torch.Tensor
    leaving: torch.Tensor


@dataclass(frozen=True)
class Replay:
    """What a replay showed: the layer's output, and its children's calls in order."""

    output: torch.Tensor
    children: tuple[ChildCall, ...]

    def child(self, name: str) -> ChildCall:
        return next(call for call in self.children if call.name == name)


def record_layer_calls(model: nn.Module, layers: Sequence[nn.Module]) -> list[LayerCall]:
    """One call per layer of an un-cached forward pass over PROBE_TOKENS tokens. The caller holds the model in eval."""
    calls: dict[int, LayerCall] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def before(_m: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                hidden = hidden_argument(args, kwargs).detach().clone()
                calls[index] = LayerCall(args, dict(kwargs), hidden, hidden)

            def after(_m: nn.Module, _args: Any, output: Any, index: int = index) -> None:
                calls[index] = replace(calls[index], leaving=hidden_output(output).detach().clone())

            for handle in (
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
        run_probe(model)
    if sorted(calls) != list(range(len(layers))):
        raise TypeError("the forward pass of the model did not call every decoder layer")
    return [calls[index] for index in range(len(layers))]


def run_probe(model: nn.Module) -> None:
    """A forward pass over PROBE_TOKENS different token ids, without a cache and without gradients."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(1, PROBE_TOKENS + 1, device=embedding.weight.device) % embedding.weight.shape[0]
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` in evaluation mode; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class LayerProbe:
    """Replays one recorded call of one layer."""

    def __init__(self, layer: nn.Module, call: LayerCall) -> None:
        self._layer = layer
        self._call = call

    @property
    def entering(self) -> torch.Tensor:
        return self._call.entering

    def run(
        self, outputs: Mapping[str, torch.Tensor] | None = None, write: tuple[Tap, Transform] | None = None
    ) -> Replay:
        """Call the layer again. `outputs` forces the hidden output of the named children; `write` installs one tap."""
        children: list[ChildCall] = []
        with torch.no_grad(), ExitStack() as stack:
            for name, child in self._layer.named_children():
                stack.enter_context(_recorded(name, child, children, (outputs or {}).get(name)))
            if write is not None:
                tap, transform = write
                stack.callback(tap.install(self._layer, transform).remove)
            args, kwargs = self._fresh_arguments()
            output = hidden_output(self._layer(*args, **kwargs)).detach().clone()
        return Replay(output, tuple(children))

    def _fresh_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        entering = self._call.entering.clone()  # a layer is free to overwrite what it is given
        if self._call.args:
            return (entering, *self._call.args[1:]), self._call.kwargs
        old = hidden_argument((), self._call.kwargs)
        return (), {name: entering if value is old else value for name, value in self._call.kwargs.items()}


@contextmanager
def _recorded(name: str, child: nn.Module, calls: list[ChildCall], forced: torch.Tensor | None) -> Iterator[None]:
    entering: list[torch.Tensor] = []

    def before(_m: nn.Module, args: Any, kwargs: Any) -> None:
        entering.append(hidden_argument(args, kwargs).detach().clone())

    def after(_m: nn.Module, _args: Any, output: Any) -> Any:
        value = hidden_output(output)
        calls.append(ChildCall(name, entering.pop(), (value if forced is None else forced).detach().clone()))
        if forced is None:
            return None
        fresh = forced.reshape(value.shape).clone()  # a layer may add into its children's results
        return type(output)((fresh, *output[1:])) if isinstance(output, (tuple, list)) else fresh

    handles: list[Callable[[], None]] = [
        child.register_forward_pre_hook(before, with_kwargs=True).remove,
        child.register_forward_hook(after).remove,
    ]
    try:
        yield
    finally:
        for remove in handles:
            remove()
