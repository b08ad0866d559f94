"""Registers trimtab's operators with PyTorch: schemas generated from `args`, one implementation per device, and fakes.

    torch.ops.trimtab.apply_steering(*SteeringOpArgs) -> Tensor     a new tensor, never an alias of its input
    torch.ops.trimtab.apply_steering_(*SteeringOpArgs) -> ()        the same, written into hidden_states
    torch.ops.trimtab.steering_monitor(*MonitorOpArgs) -> ()        multiplies gates into the per-token buffers
    torch.ops.trimtab.apply_gates_(*GateOpArgs) -> ()               decides gates, and adds what they let through
    torch.ops.trimtab.apply_slots_(*SlotOpArgs) -> ()               what slots make of a steered tensor, in place

Importing this module registers them. Triton is looked for at the first call on a CUDA tensor, not at import.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from trimtab.ops import reference
from trimtab.ops.args import (
    SLOT_ROWS,
    GateOpArgs,
    MonitorOpArgs,
    SlotForm,
    SlotOpArgs,
    SteeringOpArgs,
    check_capacity,
    check_gate_args,
    check_monitor_args,
    check_slot_args,
    check_steering_args,
)
from trimtab.responses import RESPONSES, Stage, of_stage

NAMESPACE = "trimtab"

MAX_KERNEL_WIDTH = 16384
"""Widest row that a kernel holds in registers. Wider ones, and machines without Triton, take the reference."""


def schema(name: str, fields: tuple[str, ...], *, mutates: tuple[str, ...] = (), returns: str = "()") -> str:
    """The operator schema whose arguments are `fields`, all tensors, those in `mutates` declared as written to."""
    aliases = {field: f"({chr(ord('a') + number)}!)" for number, field in enumerate(mutates)}
    arguments = ", ".join(f"Tensor{aliases.get(field, '')} {field}" for field in fields)
    return f"{name}({arguments}) -> {returns}"


SCHEMAS = {
    "apply_steering": schema("apply_steering", SteeringOpArgs._fields, returns="Tensor"),
    "apply_steering_": schema("apply_steering_", SteeringOpArgs._fields, mutates=("hidden_states",)),
    "steering_monitor": schema(
        "steering_monitor", MonitorOpArgs._fields, mutates=("steering_token_scales", "steering_row_gate")
    ),
    "apply_gates_": schema(
        "apply_gates_", GateOpArgs._fields, mutates=("steered", "gate_values", "gate_gains", "gate_owns")
    ),
    "apply_slots_": schema("apply_slots_", SlotOpArgs._fields, mutates=("steered", "slot_corrections")),
}


def _apply_fake(*tensors: Tensor) -> Tensor:
    args = SteeringOpArgs(*tensors)
    check_steering_args(args)
    return args.hidden_states.new_empty(args.hidden_states.shape)


def _apply_in_place_fake(*tensors: Tensor) -> None:
    check_steering_args(SteeringOpArgs(*tensors))


def _monitor_fake(*tensors: Tensor) -> None:
    check_monitor_args(MonitorOpArgs(*tensors))


def _gates_fake(*tensors: Tensor) -> None:
    check_gate_args(GateOpArgs(*tensors))


def _slots_fake(*tensors: Tensor) -> None:
    check_slot_args(SlotOpArgs(*tensors))


def _apply_cpu(*tensors: Tensor) -> Tensor:
    args = _checked_steering(tensors)
    if args.any_active.item():
        return reference.apply_steering(args)
    return args.hidden_states.clone(memory_format=torch.contiguous_format)


def _apply_in_place_cpu(*tensors: Tensor) -> None:
    args = _checked_steering(tensors)
    if args.any_active.item():
        args.hidden_states.copy_(reference.apply_steering(args))


def _monitor_cpu(*tensors: Tensor) -> None:
    args = _checked_monitor(tensors)
    if args.monitor_active.item():
        reference.steering_monitor(args)


def _gates_cpu(*tensors: Tensor) -> None:
    args = GateOpArgs(*tensors)
    if args.gate_sites[: args.hidden_states.shape[0]].any().item():
        _gates_any_device(*tensors)
    else:
        _checked_gates(tensors).gate_gains[:, : args.hidden_states.shape[0]] = 0.0


def _slots_cpu(*tensors: Tensor) -> None:
    args = _checked_slots(tensors)
    rows = args.slot_rows.flatten(1).any(1) | args.slot_codes[..., 0].any(1)
    acting = rows[args.steering_index[: args.steered.shape[0]]]
    if acting.any().item():
        args.steered[acting] = _with_slots(args)[acting]


def _apply_any_device(*tensors: Tensor) -> Tensor:
    """For devices without a kernel of ours: the reference, without waiting for the flag."""
    args = _checked_steering(tensors)
    return torch.where(args.any_active, reference.apply_steering(args), args.hidden_states).contiguous()


def _apply_in_place_any_device(*tensors: Tensor) -> None:
    SteeringOpArgs(*tensors).hidden_states.copy_(_apply_any_device(*tensors))


def _monitor_any_device(*tensors: Tensor) -> None:
    reference.steering_monitor(_checked_monitor(tensors))


def _gates_any_device(*tensors: Tensor) -> None:
    args = _checked_gates(tensors)
    stream = args.hidden_states.float()
    if args.hidden_rest.shape[0]:
        stream = stream + args.hidden_rest.float()
    reference.decide_gates(stream, args)
    if args.steered.shape[0]:
        gates = reference.Gates(args.gate_rows, args.gate_gains)
        args.steered.copy_(reference.add_gated(args.steered.float(), args.steering_table, gates))


def _slots_any_device(*tensors: Tensor) -> None:
    args = _checked_slots(tensors)
    args.steered.copy_(_with_slots(args))


def _with_slots(args: SlotOpArgs) -> Tensor:
    """The new values of `steered`, in its dtype."""
    slots = reference.Slots(*args[3:-1], args.slot_corrections.unbind(0))
    rest = args.hidden_rest if args.hidden_rest.shape[0] else None
    hidden = args.hidden_states if args.hidden_states.shape[0] else None
    known = [name for name in RESPONSES if not RESPONSES[name].reads_float32 or slots.rows.shape[2] > SLOT_ROWS]
    names = tuple(known) if hidden is not None else of_stage(known, Stage.LOCAL)
    form = SlotForm(slots.rows.shape[1], names, writes=True)
    return reference.apply_slots(args.steered.float(), slots, form, rest, hidden).to(args.steered.dtype)


def _apply_cuda(*tensors: Tensor) -> Tensor:
    if not kernels_serve(tensors[0]):
        return _apply_any_device(*tensors)
    from trimtab.ops.kernels.apply_steering import launch_apply_steering

    args = _checked_steering(tensors)
    out = args.hidden_states.new_empty(args.hidden_states.shape)
    launch_apply_steering(args, out)
    return out


def _apply_in_place_cuda(*tensors: Tensor) -> None:
    if not kernels_serve(tensors[0]):
        return _apply_in_place_any_device(*tensors)
    from trimtab.ops.kernels.apply_steering import launch_apply_steering

    args = _checked_steering(tensors)
    launch_apply_steering(args, args.hidden_states)


def _monitor_cuda(*tensors: Tensor) -> None:
    if not kernels_serve(tensors[0]):
        return _monitor_any_device(*tensors)
    from trimtab.ops.seed.steering_monitor import launch_steering_monitor

    launch_steering_monitor(_checked_monitor(tensors))


def _gates_cuda(*tensors: Tensor) -> None:
    if not kernels_serve(tensors[0]):
        return _gates_any_device(*tensors)
    from trimtab.ops.kernels.apply_gates import launch_apply_gates

    launch_apply_gates(_checked_gates(tensors))


def _slots_cuda(*tensors: Tensor) -> None:
    if not kernels_serve(tensors[0]):
        return _slots_any_device(*tensors)
    from trimtab.ops.kernels.apply_slots import launch_apply_slots

    launch_apply_slots(_checked_slots(tensors))


def _checked_steering(tensors: tuple[Tensor, ...]) -> SteeringOpArgs:
    args = SteeringOpArgs(*tensors)
    check_steering_args(args)
    check_capacity(
        args.hidden_states,
        args.steering_index,
        args.steering_row_gate,
        args.steering_token_scales,
        args.steering_decode_mask,
    )
    return args


def _checked_monitor(tensors: tuple[Tensor, ...]) -> MonitorOpArgs:
    args = MonitorOpArgs(*tensors)
    check_monitor_args(args)
    check_capacity(args.hidden_states, args.steering_token_scales, args.steering_row_gate, args.steering_decode_mask)
    return args


def _checked_gates(tensors: tuple[Tensor, ...]) -> GateOpArgs:
    args = GateOpArgs(*tensors)
    check_gate_args(args)
    tokens = args.hidden_states.shape[0]
    if not {args.steered.shape[0], args.hidden_rest.shape[0]} <= {0, tokens}:
        raise ValueError(f"{tokens} tokens, but steered has {args.steered.shape[0]}, the rest {args.hidden_rest.shape}")
    per_token = (args.gate_rows, args.gate_probes, args.gate_sites, args.gate_params)
    check_capacity(args.hidden_states, *per_token, *(part.t() for part in args[-3:]))
    return args


def _checked_slots(tensors: tuple[Tensor, ...]) -> SlotOpArgs:
    args = SlotOpArgs(*tensors)
    check_slot_args(args)
    tokens = args.steered.shape[0]
    for name in ("hidden_states", "hidden_rest"):
        if (found := getattr(args, name).shape[0]) not in (0, tokens):
            raise ValueError(f"{tokens} tokens, but {name} has {found}")
    per_token = (args.gate_values.t(),) if args.gate_values.shape[0] else ()
    check_capacity(args.steered, args.steering_index, args.slot_corrections.t(), *per_token)
    return args


def kernels_serve(hidden_states: Tensor) -> bool:
    """Whether a CUDA tensor of this width is steered by a kernel, rather than by the reference."""
    return hidden_states.shape[-1] <= MAX_KERNEL_WIDTH and has_triton()


@cache
def has_triton() -> bool:
    """Whether this process can launch kernels of ours."""
    return importlib.util.find_spec("triton") is not None


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    implementations = {
        "apply_steering": (_apply_fake, _apply_cpu, _apply_cuda, _apply_any_device),
        "apply_steering_": (
            _apply_in_place_fake,
            _apply_in_place_cpu,
            _apply_in_place_cuda,
            _apply_in_place_any_device,
        ),
        "steering_monitor": (_monitor_fake, _monitor_cpu, _monitor_cuda, _monitor_any_device),
        "apply_gates_": (_gates_fake, _gates_cpu, _gates_cuda, _gates_any_device),
        "apply_slots_": (_slots_fake, _slots_cpu, _slots_cuda, _slots_any_device),
    }
    for name, (fake, cpu, cuda, any_device) in implementations.items():
        library.define(SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        library.impl(name, any_device, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        library.impl(name, cpu, "CPU")  # type: ignore[no-untyped-call]
        library.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library


_LIBRARY = _register()  # the registration lives as long as this object
