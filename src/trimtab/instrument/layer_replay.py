"""Run one decoder layer again, on a recorded call, with parts of it silenced or replaced.

This is how the conventions of a layer are found and checked by numbers: what its output does when the attention or the
MLP is forced to a known value says where the additions are, whatever the modules are called.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument.taps import (
    Tap,
    Transform,
    hidden_argument,
    hidden_output,
    replace_hidden_argument,
    replace_hidden_output,
)

PROBE_ROWS, PROBE_TOKENS = 2, 5
PROBE_END = 2  # the last token of the shorter row


@dataclass(frozen=True)
class LayerCall:
    """One call of a decoder layer: its arguments, and copies of the hidden states that went in and came out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entering: torch.Tensor
    leaving: torch.Tensor


@dataclass(frozen=True)
class ChildCall:
    """One call of a direct child of the layer during a replay, with copies of its hidden input and output; of what is
    not a tensor, an empty one."""

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


def record_layer_calls(layers: Sequence[nn.Module], run: Callable[[], object]) -> list[LayerCall]:
    """The call of each layer in what `run` does: what came to it and what it returned, before hooks that `run` sets."""
    calls: dict[int, LayerCall] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):

            def before(_m: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                hidden = hidden_argument(args, kwargs).detach().clone()
                calls[index] = LayerCall(_kept(args), _kept(kwargs), hidden, hidden)

            def after(_m: nn.Module, _args: Any, output: Any, index: int = index) -> None:
                calls[index] = replace(calls[index], leaving=hidden_output(output).detach().clone())

            for handle in (
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
        run()
    if sorted(calls) != list(range(len(layers))):
        raise SteeringError("model", "a forward pass does not call every decoder layer")
    return [calls[index] for index in range(len(layers))]


def run_probe(model: nn.Module, last_token: int = 5, *, padded: bool = True) -> torch.Tensor:
    """The result of a pass over PROBE_ROWS prompts of different lengths and tokens: [rows, columns, width of the head].

    Row 0 holds PROBE_TOKENS tokens; row 1 ends at PROBE_END with `last_token`, the rest of it is padding, or, if not
    `padded`, other tokens.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.arange(1, PROBE_ROWS * PROBE_TOKENS + 1).reshape(PROBE_ROWS, PROBE_TOKENS) + 5
    ids[1, PROBE_END] = last_token
    mask = torch.ones_like(ids)
    if padded:
        ids[1, PROBE_END + 1 :], mask[1, PROBE_END + 1 :] = 0, 0
    device = embedding.weight.device
    return run_tokens(model, (ids % embedding.weight.shape[0]).to(device), mask.to(device))


def run_tokens(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The result of a forward pass over a padded batch [rows, columns], without a cache and without gradients.

    The whole model runs, since it may make its masks and positions anywhere on the way to its layers.
    """
    with torch.no_grad():
        result = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    first: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    return first


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` for this thread, in evaluation mode and compiled code off; afterwards each module is in the mode
    that it was in.

    Hooks act on every pass of the model, whichever thread runs it: other threads that want to hold it wait. Code that
    was compiled before a hook came would not call it.
    """
    with _lock:
        held = _held.setdefault(model, RLock())
    with held, _compiled_code_off():
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


_lock = Lock()
_held: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()  # a lock for each model
_stance: list[ExitStack] = []  # one for each that wants compiled code off; the last to leave turns it on again


@contextmanager
def _compiled_code_off() -> Iterator[None]:
    """torch has one stance for all threads, and restores on leaving what it found on entering: where two threads
    overlapped, the last one would leave compiled code off for good."""
    with _lock:
        stack = ExitStack() if not _stance else _stance[0]
        if not _stance:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        _stance.append(stack)
    try:
        yield
    finally:
        with _lock:
            _stance.pop()
            if not _stance:
                stack.close()


class LayerProbe:
    """Replays one recorded call of one layer."""

    def __init__(self, layer: nn.Module, call: LayerCall) -> None:
        self._layer = layer
        self._call = call

    @property
    def entering(self) -> torch.Tensor:
        return self._call.entering

    def run(
        self,
        outputs: Mapping[str, torch.Tensor] | None = None,
        write: tuple[Tap, Transform] | None = None,
        entering: torch.Tensor | None = None,
    ) -> Replay:
        """Call the layer again, with other hidden states `entering` if given.

        `outputs` forces the hidden output of the named children; `write` installs one tap, whose change shows in what
        is recorded.
        """
        children: list[ChildCall] = []
        with torch.no_grad(), ExitStack() as stack:
            if write is not None:
                tap, transform = write
                stack.callback(tap.install(self._layer, transform).remove)
            for name, child in self._layer.named_children():
                stack.enter_context(_recorded(name, child, children, (outputs or {}).get(name)))
            args, kwargs = self._arguments(self._call.entering if entering is None else entering)
            output = hidden_output(self._layer(*args, **kwargs)).detach().clone()
        return Replay(output, tuple(children))

    def _arguments(self, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        entering = hidden.clone()  # a layer is free to overwrite what it is given
        args, kwargs = _kept(self._call.args), _kept(self._call.kwargs)
        return replace_hidden_argument(args, kwargs, hidden_argument(args, kwargs), entering)


def _kept(arguments: Any) -> Any:
    """The arguments as they are now: caches and dictionaries, which layers write to, are copied."""
    if isinstance(arguments, tuple):
        return tuple(_kept_one(value) for value in arguments)
    return {name: _kept_one(value) for name, value in arguments.items()}


def _kept_one(value: Any) -> Any:
    return deepcopy(value) if isinstance(value, dict) or hasattr(value, "get_seq_length") else value


@contextmanager
def _recorded(name: str, child: nn.Module, calls: list[ChildCall], forced: torch.Tensor | None) -> Iterator[None]:
    entering: list[torch.Tensor] = []

    def before(_m: nn.Module, args: Any, kwargs: Any) -> None:
        entering.append(_copy_of(lambda: hidden_argument(args, kwargs)))

    def after(_m: nn.Module, _args: Any, output: Any) -> Any:
        leaving = _copy_of(lambda: hidden_output(output))
        if forced is None or not leaving.numel():
            calls.append(ChildCall(name, entering.pop(), leaving))
            return None
        calls.append(ChildCall(name, entering.pop(), forced.detach().clone()))
        return replace_hidden_output(output, forced.reshape(leaving.shape).clone())  # a layer may add into it

    handles: list[Callable[[], None]] = [
        child.register_forward_pre_hook(before, with_kwargs=True).remove,
        child.register_forward_hook(after).remove,
    ]
    try:
        yield
    finally:
        for remove in handles:
            remove()


def _copy_of(find: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A copy of the tensor that `find` finds; an empty one where a module takes or returns none."""
    try:
        return find().detach().clone()
    except TypeError:
        return torch.empty(0)
