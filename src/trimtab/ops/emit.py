"""The one call that an engine makes at a hook point: traced math inside a compiled graph, the operator elsewhere."""

import torch
from torch import Tensor, nn

from trimtab.ops import reference
from trimtab.ops.args import SteeringOpArgs
from trimtab.ops.buffers import emission, has_steering, monitor_op_args, steering_op_args
from trimtab.sites import HookPoint


def emit(module: nn.Module, hook: HookPoint, hidden: Tensor, *, in_place: bool = False) -> Tensor:
    """Steer `hidden` [..., H] with the buffers that `module` holds for `hook`, and return the result.

    A module without buffers for the hook returns `hidden` itself, and a compiled graph then holds nothing of ours.
    How the module steers is set by its `Emission` (see `trimtab.ops.buffers`). `in_place` lets the operator write into
    `hidden`, so an idle site costs a launch and no copy; callers must use the returned tensor in either case.
    """
    if not has_steering(module, hook):
        return hidden
    tokens = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    mode = emission(module)
    args = steering_op_args(module, hook, tokens)
    if mode.traced and torch.compiler.is_compiling():
        if mode.cross_layer:
            reference.steering_monitor(monitor_op_args(module, hook, tokens))
        out = reference.apply_steering(args, mode.terms._replace(monitor=mode.terms.monitor and not mode.cross_layer))
    else:
        if mode.cross_layer:
            torch.ops.trimtab.steering_monitor(*monitor_op_args(module, hook, tokens))
        out = _operator(args, in_place)
    return out if hidden.dim() == 2 else out.reshape(hidden.shape)


def _operator(args: SteeringOpArgs, in_place: bool) -> Tensor:
    if not in_place:
        out: Tensor = torch.ops.trimtab.apply_steering(*args)
        return out
    torch.ops.trimtab.apply_steering_(*args)
    return args.hidden_states
