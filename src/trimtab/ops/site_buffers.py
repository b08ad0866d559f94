"""The tensors that a steered module reads: their names, and how the operators' arguments are collected from them.

Whoever owns them, `engine_buffers.SteeringBuffers` or the module itself, a module has the same non-persistent buffers
under the same names.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.ops.args import NO_THRESHOLD, MonitorOpArgs, SteeringOpArgs
from trimtab.ops.emission import emission
from trimtab.sites import HookPoint

TOKEN_BYTES = 64
"""Bytes of one token in the slab: int64 index, then float32 row gate, token scale and decode mask, 16 bytes apart.

Compiled graphs and kernels take their inputs to be aligned. A compiled graph copies an input that is not, at every
call: in vLLM, whose graphs are cut at each attention layer, that is one copy per layer and step.
"""

MONITOR_OFF = "steering_monitor_off"
"""Buffer that stands in for `steering_monitor_active` in cross-layer mode. Nothing ever writes it."""

_ALIGNMENT = 16  # bytes; kernels are compiled per pointer alignment, so every site's views share one
PER_TOKEN = ("steering_index", "steering_token_scales", "steering_row_gate", "steering_decode_mask")
_SHARED = (*PER_TOKEN, "steering_scales")


def buffer_name(field: str, hook: HookPoint) -> str:
    """The name of the buffer that feeds `field` of `SteeringOpArgs` at `hook`.

    Tensors shared by all hook points keep the field's name; the others are `steering_table_{hook}` and suffixes of it.
    """
    if field in _SHARED:
        return field
    table = f"steering_table_{hook.value}"
    return table if field == "steering_table" else f"{table}_{field.removeprefix('steering_')}"


_NAMES = {hook: tuple(buffer_name(field, hook) for field in SteeringOpArgs._fields[1:]) for hook in HookPoint}


def has_steering(module: nn.Module, hook: HookPoint) -> bool:
    """Whether `module` holds buffers for `hook`."""
    return hasattr(module, f"steering_table_{hook.value}")


def steering_op_args(module: nn.Module, hook: HookPoint, hidden: Tensor) -> SteeringOpArgs:
    """The operator's arguments for `hidden` [N, H] at `hook`, from the module's own buffers.

    In cross-layer mode the monitor has already acted on the per-token buffers, so its flag is replaced by one that is
    never set: the gate acts once.
    """
    args = SteeringOpArgs(hidden, *[getattr(module, name) for name in _NAMES[hook]])
    if emission(module).cross_layer:
        args = args._replace(steering_monitor_active=getattr(module, MONITOR_OFF))
    return args


def monitor_op_args(module: nn.Module, hook: HookPoint, hidden: Tensor) -> MonitorOpArgs:
    """The monitor's arguments for `hidden` [N, H] at `hook`, from the module's own buffers."""
    args = SteeringOpArgs(hidden, *[getattr(module, name) for name in _NAMES[hook]])
    return MonitorOpArgs(
        hidden_states=hidden,
        probe=args.steering_monitor_probe,
        params=args.steering_monitor_params,
        monitor_active=args.steering_monitor_active,
        steering_token_scales=args.steering_token_scales,
        steering_decode_mask=args.steering_decode_mask,
        steering_row_gate=args.steering_row_gate,
    )


def row_monitor_tensors(table: Tensor) -> tuple[Tensor, Tensor]:
    """Full-size row-monitor tensors for a site's `table` [R, H]: zero probes, and params that gate nothing."""
    rows, width = table.shape
    probes = torch.zeros(rows, width, dtype=torch.float32, device=table.device)
    return probes, row_params(1, rows, table.device)[0]


def row_monitor_dummies(device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """What stands in for those tensors at a site without the row monitor: [1, 1] and [1, 2]."""
    return torch.zeros(1, 1, dtype=torch.float32, device=device), row_params(1, 1, device)[0]


def token_views(slab: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a [T, 64] uint8 slab: index (int64), row gate, token scale and decode mask (float32), each [T].

    Each has a storage object of its own over the slab's memory. Compilers track aliasing by storage, and these four
    never overlap: inside one storage, a graph in which the monitor multiplies two of them could not be compiled.
    """
    floats = slab.view(torch.float32)
    views = slab.view(torch.int64)[:, 0], floats[:, 4], floats[:, 8], floats[:, 12]
    index, row_gate, token_scales, decode_mask = (torch.from_dlpack(view) for view in views)  # type: ignore[attr-defined]
    return index, row_gate, token_scales, decode_mask


def aligned(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros [count, *shape] whose first-dimension slices all start on the alignment that kernels are compiled for."""
    size = 1
    for extent in shape:
        size *= extent
    step = _ALIGNMENT // dtype.itemsize
    padded = -(-size // step) * step
    return torch.zeros(count, padded, dtype=dtype, device=device)[:, :size].view(count, *shape)


def aligned_record(parts: Mapping[str, tuple[type[np.generic], tuple[int, ...]]]) -> np.dtype[np.void]:
    """A structure of `parts` in their order, each of which starts on the alignment that kernels are compiled for."""
    offsets, end = [], 0
    for kind, shape in parts.values():
        offsets.append(end)
        end += -(-np.dtype((kind, shape)).itemsize // _ALIGNMENT) * _ALIGNMENT
    return np.dtype({"names": list(parts), "formats": list(parts.values()), "offsets": offsets, "itemsize": end})


def row_params(count: int, rows: int, device: torch.device | str | None) -> Tensor:
    """Row-monitor params [count, rows, 2] that gate nothing: threshold and sharpness of each row at each site."""
    params = aligned(count, (rows, 2), torch.float32, device)
    params[..., 0] = NO_THRESHOLD
    params[..., 1] = 1.0
    return params
