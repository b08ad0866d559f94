"""What every kernel launch shares: arguments by name, sizes of the launch, and the device it runs on."""

import contextlib
import dataclasses
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from trimtab.ops.args import SteeringOpArgs

MAX_WIDTH = 16384
"""Widest row that one program holds in registers."""

REGISTERS = 65536
"""Registers of a multiprocessor."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Sizes of one launch. All but `programs` select a compiled variant."""

    block: int  # elements of a row held at once, a power of two
    num_warps: int
    registers: int | None  # upper bound per thread; None leaves it to the compiler
    programs: int  # among which the tokens are shared out; each has at least one


def launch_sizes(width: int, tokens: int, device: torch.device) -> Launch:
    """The launch for N `tokens` of `width` H. What selects a variant depends on `width` alone.

    A program takes one token at a time and holds its row at 8 elements per thread, one 16-byte load of bfloat16; a
    16384-wide row at 32, because more threads than 512 would leave each too few registers. The grid is bounded, so a
    flag that is off costs a few waves of one load and not a program per token.
    """
    block = triton.next_power_of_2(width)
    num_warps = min(32 if block <= 8192 else 16, max(1, block // 256))
    return Launch(block, num_warps, None, min(tokens, multiprocessors(device) * (64 // num_warps)))


def steering_launch_sizes(args: SteeringOpArgs) -> Launch:
    """The launch of `apply_steering`, by measurement on an H200 (`benchmarks/ops.py --tune`).

    16 elements per thread: at 8 the loads of a token's few numbers, which every warp repeats, weigh too much. With the
    row monitor 32, so that fewer warps wait for one another in the sum, and at 16384 too, because more threads than 512
    would leave each too few registers. The bound on registers is what does not spill (4 per element, 6 in float32; of a
    16384-wide float32 row some do), and there are as many programs as are then resident at once.
    """
    hidden = args.hidden_states
    return _steering_sizes(*hidden.shape, hidden.element_size(), args.has_row_monitor, hidden.device)


@lru_cache(maxsize=1024)  # computing them takes the host as long as a tenth of the launch
def _steering_sizes(tokens: int, width: int, element_size: int, row_monitor: bool, device: torch.device) -> Launch:
    block = triton.next_power_of_2(width)
    per_thread = 32 if row_monitor or block > 8192 else 16
    num_warps = max(1, block // (32 * per_thread))
    per_element = 4 if element_size == 2 else 6
    registers = min(per_element * per_thread, REGISTERS // (32 * num_warps))
    return resident(tokens, Launch(block, num_warps, registers, 1), device)


def resident(tokens: int, sizes: Launch, device: torch.device) -> Launch:
    """`sizes` with as many programs as `device` holds at once, but no more than there are `tokens`."""
    assert sizes.registers is not None
    programs = multiprocessors(device) * max(1, REGISTERS // (32 * sizes.num_warps * sizes.registers))
    return dataclasses.replace(sizes, programs=min(tokens, programs))


def named_arguments(kernel: Any, args: NamedTuple, **more: Tensor) -> dict[str, Any]:
    """The tensors of `args` and `more` as `p_{name}`, with the strides that `kernel` asks for as `{name}_stride_{dim}`.

    (The prefix also keeps clear of names that Triton's generated launcher uses itself, `params` among them.)

    A dimension of one element has no stride worth the name: a row's is given as if it were packed, so that a single
    token of any layout runs the same variant as many.
    """
    tensors: Mapping[str, Tensor] = args._asdict() | more
    arguments: dict[str, Any] = {f"p_{field}": tensor for field, tensor in tensors.items()}
    for field, dim in _stride_parameters(kernel):
        tensor = tensors[field]
        packed = dim == 0 and tensor.dim() == 2 and tensor.shape[0] == 1
        arguments[f"{field}_stride_{dim}"] = tensor.shape[1] if packed else tensor.stride(dim)
    return arguments


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's CUDA device current, where it is not."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@cache
def _stride_parameters(kernel: Any) -> tuple[tuple[str, int], ...]:
    names = [name.rpartition("_stride_") for name in kernel.arg_names]
    return tuple((field, int(dim)) for field, mark, dim in names if mark)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    # Without CUDA only Triton's interpreter gets here; a few programs let it walk several tokens each.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
