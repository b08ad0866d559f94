"""Steered versions of vLLM's layer classes.

A layer is steered by exchanging the class of that one instance for a subclass whose `forward` calls the original and
then adds. Draft models that share the class are untouched, weights and buffers stay where they are, and what is traced
is ordinary code of this file on ordinary buffers: no hook handles or closures, whose names would differ from one
process to the next and so break vLLM's stored compile artifacts. For the same reason the subclasses are attributes of
this module, named after their base.
"""

import inspect
from typing import Any

from torch import nn

from trimtab.engines.vllm.worker.conventions import Convention
from trimtab.ops import emit
from trimtab.sites import HookPoint

Slot = tuple[int, str]
"""Where `forward` takes an argument: its position, not counting self, and its name."""

_HIDDEN_NAMES = ("hidden_states", "x", "hidden_state", "inputs")


class SteeredLayer:
    """Mixed in before a decoder layer's class: adds to the stream that enters and to the stream that leaves."""

    steering_convention: Convention
    steering_hidden: Slot
    steering_residual: Slot | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "steering_table_pre_attn"):
            args, kwargs = self._steer_entering(args, kwargs)
        # An input may have been overwritten in place from here on: only results are touched.
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.steering_convention is Convention.SPLIT:
            hidden, residual = out
            return hidden, emit(_module(self), HookPoint.POST_BLOCK, residual, rest=hidden, in_place=True)
        if isinstance(out, tuple):
            return (emit(_module(self), HookPoint.POST_BLOCK, out[0], in_place=True), *out[1:])
        return emit(_module(self), HookPoint.POST_BLOCK, out, in_place=True)

    def _steer_entering(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        slot, rest = self.steering_hidden, None
        if self.steering_convention is Convention.SPLIT and self.steering_residual is not None:
            # The first layer of the model is given no residual yet: its hidden states are the stream.
            residual = argument(args, kwargs, self.steering_residual)
            slot, rest = (slot, None) if residual is None else (self.steering_residual, argument(args, kwargs, slot))
        stream = argument(args, kwargs, slot)
        return with_argument(args, kwargs, slot, emit(_module(self), HookPoint.PRE_ATTN, stream, rest=rest))


class SteeredBranch:
    """Mixed in before the class of a layer's child: adds to what it is given, to what it returns, or to both."""

    steering_input: HookPoint | None
    steering_outputs: tuple[HookPoint, ...]  # in forward order
    steering_hidden: Slot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.steering_input is not None:
            steered = emit(_module(self), self.steering_input, argument(args, kwargs, self.steering_hidden))
            args, kwargs = with_argument(args, kwargs, self.steering_hidden, steered)
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        made = out[0] if isinstance(out, tuple) else out
        for hook in self.steering_outputs:
            made = emit(_module(self), hook, made, in_place=True)
        return (made, *out[1:]) if isinstance(out, tuple) else made


class SteeredJoin:
    """Mixed in before the class of the norm that adds the attention's output to the stream: it is given both, so the
    stream after that add can be read here. What is added goes to the attention's output, as without a reader."""

    def forward(self, hidden: Any, residual: Any, *args: Any, **kwargs: Any) -> Any:
        steered = emit(_module(self), HookPoint.POST_ATTN, hidden, rest=residual, in_place=True)
        return super().forward(steered, residual, *args, **kwargs)  # type: ignore[misc]


def steered_layer_class(base: type, convention: Convention) -> type:
    """The steered subclass of a decoder layer's class: the same object for the same arguments."""
    hidden, residual = stream_slots(base)
    attributes = {
        "steering_convention": convention,
        "steering_hidden": hidden,
        "steering_residual": residual,
    }
    return _subclass(SteeredLayer, base, convention.value, attributes)


def steered_branch_class(base: type, steering_input: HookPoint | None, steering_outputs: tuple[HookPoint, ...]) -> type:
    """The steered subclass of the class of a layer's child: the same object for the same arguments."""
    attributes = {
        "steering_input": steering_input,
        "steering_outputs": steering_outputs,
        "steering_hidden": stream_slots(base)[0],
    }
    label = "_".join(hook.value for hook in (steering_input, *steering_outputs) if hook is not None)
    return _subclass(SteeredBranch, base, label, attributes)


def steered_join_class(base: type) -> type:
    """The steered subclass of the class of a layer's norm behind the attention: the same object for the same class."""
    return _subclass(SteeredJoin, base, HookPoint.POST_ATTN.value, {})


def stream_slots(base: type) -> tuple[Slot, Slot | None]:
    """Where among the arguments of a class's `forward` the hidden states are, and the residual, if it takes one."""
    names = list(inspect.signature(base.forward).parameters)[1:]  # type: ignore[attr-defined]
    hidden = next((slot for slot in _HIDDEN_NAMES if slot in names), names[0])
    return (names.index(hidden), hidden), (names.index("residual"), "residual") if "residual" in names else None


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
    """What a call gives for a slot; None if nothing."""
    position, name = slot
    return args[position] if position < len(args) else kwargs.get(name)


def with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another value in a slot."""
    position, name = slot
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _subclass(mixin: type, base: type, label: str, attributes: dict[str, Any]) -> type:
    origin = f"{base.__module__}.{base.__qualname__}".replace(".", "_").replace("<", "_").replace(">", "_")
    name = f"{mixin.__name__}_{label}_{origin}"
    known = globals().get(name)
    if isinstance(known, type) and known.__mro__[2] is base:
        return known
    made = type(name, (mixin, base), {**attributes, "__module__": __name__, "__qualname__": name})
    globals()[name] = made
    return made


def _module(layer: Any) -> nn.Module:
    """`layer` as what it is once mixed in; costs nothing."""
    assert isinstance(layer, nn.Module)
    return layer
