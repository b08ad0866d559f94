"""The one call that an engine makes at a hook point: traced math inside a compiled graph, the operator elsewhere."""

import torch
from torch import Tensor, nn

from trimtab.ops import reference
from trimtab.ops.args import SteeringOpArgs
from trimtab.ops.emission import emission
from trimtab.ops.gate_buffers import decided_gates, decides, gate_count, gate_op_args
from trimtab.ops.gather import stored
from trimtab.ops.host import rests
from trimtab.ops.site_buffers import has_steering, monitor_op_args, steering_op_args
from trimtab.ops.slot_buffers import site_slots, slot_form, slot_op_args, steered_dtype
from trimtab.sites import HookPoint


def emit(
    module: nn.Module, hook: HookPoint, hidden: Tensor, *, rest: Tensor | None = None, in_place: bool = False
) -> Tensor:
    """Steer `hidden` [..., H] with the buffers that `module` holds for `hook`, and return the result.

    A module without buffers for the hook returns `hidden` itself, and a compiled graph then holds nothing of ours; so
    does, in eager execution, a site that rests. How the module steers is set by its `Emission`. `rest`, of the same
    shape, is what must be added to `hidden` to make the stream that a probe reads, where the model keeps it in two
    parts: for slots, for gates, for the monitor in cross-layer mode, and where the site has the row monitor's tensors
    for the monitors that are part of the operator, which elsewhere read `hidden` alone. `in_place` lets the operator
    write into `hidden`, outside of compiled graphs, so an idle site costs a launch and no copy; where gates or slots
    look at what it was, it is left as it is. Callers must use the returned tensor in either case.
    """
    compiling = torch.compiler.is_compiling()
    mode = emission(module)
    if (mode.eager and not compiling and rests(module, hook)) or not has_steering(module, hook):
        return hidden
    tokens = hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
    rest = None if rest is None else rest.reshape(tokens.shape)
    args = steering_op_args(module, hook, tokens)
    scored = rest if args.has_row_monitor else None
    slots = slot_form(module, hook)
    monitor = None
    if mode.cross_layer and mode.monitor_at in (None, hook):
        monitor = monitor_op_args(module, hook, tokens if rest is None else tokens.float() + rest.float())
    if mode.traced and compiling:
        if monitor is not None:
            reference.steering_monitor(monitor, mode.terms)
        if decides(module, hook):  # the first site with gates does: what later ones add was decided in this pass
            undone = tokens.new_empty(0, tokens.shape[1])
            torch.ops.trimtab.apply_gates_(*gate_op_args(module, hook, undone, tokens, rest))
        gates = decided_gates(module) if gate_count(module, hook) else None
        terms = mode.terms._replace(monitor=mode.terms.monitor and not mode.cross_layer)
        out = reference.add_steering(args, terms, gates, scored)
        if slots is not None:
            out = reference.apply_slots(out, site_slots(module, hook), slots, rest, tokens)
        out = stored(out.to(tokens.dtype).contiguous())
    else:
        if monitor is not None:
            torch.ops.trimtab.steering_monitor(*monitor)
        gated = gate_count(module, hook) > 0
        args = args._replace(hidden_states=tokens.to(steered_dtype(module, hook, tokens.dtype)))
        if scored is not None:
            out = _added_to_part(args, scored)
        else:
            looked_at = gated or (slots is not None and slots.looks_back)  # as what the tensor was before
            out = _operator(args, in_place and not (compiling or looked_at))
        if gated:
            torch.ops.trimtab.apply_gates_(*gate_op_args(module, hook, out, tokens, rest))
        if slots is not None:
            torch.ops.trimtab.apply_slots_(*slot_op_args(module, hook, out, rest, tokens))
        out = out.to(tokens.dtype)
    return out if hidden.dim() == 2 else out.reshape(hidden.shape)


def _added_to_part(args: SteeringOpArgs, rest: Tensor) -> Tensor:
    """`args.hidden_states`, a part of the stream, plus what the operator adds to the whole of it.

    The operator reads what it steers. The sum stays in float32, so what comes out of the difference is what went in,
    and a token to which nothing is added keeps its numbers.
    """
    part = args.hidden_states
    stream = part.float() + rest.float()
    steered = _operator(args._replace(hidden_states=stream), in_place=False)
    return (part.float() + (steered - stream)).to(part.dtype)


def _operator(args: SteeringOpArgs, in_place: bool) -> Tensor:
    if not in_place:
        out: Tensor = torch.ops.trimtab.apply_steering(*args)
        return out
    torch.ops.trimtab.apply_steering_(*args)
    return args.hidden_states
