"""What every kernel launch shares: arguments by name, sizes of the launch, and the device it runs on."""

import contextlib
import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from trimtab.ops.args import SteeringOpArgs

MAX_WIDTH = 16384
"""Widest row that one program holds in registers."""

REGISTERS = 65536
"""Registers of a multiprocessor."""

MOST_CHUNK = 4
"""Neighbouring tokens that a program of `apply_steering` takes at a time where there are enough for all programs."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Sizes of one launch. All but `programs` and `chunk` select a compiled variant."""

    block: int  # elements of a row held at once, a power of two
    num_warps: int
    registers: int | None  # upper bound per thread; None leaves it to the compiler
    programs: int  # among which the tokens are shared out; each has at least one
    chunk: int = 1  # neighbouring tokens that a program takes at a time


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

    16 elements per thread: at 8 the loads of a token's few numbers, which every warp repeats, weigh too much. A wide
    row with its float32 probe takes 32, so that fewer threads share the registers. The bound on registers is the least
    without spills, and the grid what is then resident at once.
    """
    tokens, width = args.hidden_states.shape
    block = triton.next_power_of_2(width)
    per_thread = 32 if block > (4096 if args.has_row_monitor else 8192) else 16
    num_warps = max(1, block // (32 * per_thread))
    registers = (4 if args.hidden_states.element_size() == 2 else 6) * per_thread
    return shared_out(tokens, Launch(block, num_warps, registers, 1), MOST_CHUNK, args.hidden_states.device)


def shared_out(tokens: int, sizes: Launch, most_chunk: int, device: torch.device) -> Launch:
    """`sizes` with the programs that `device` holds at once, and chunks of up to `most_chunk` if these get as many."""
    assert sizes.registers is not None
    resident = multiprocessors(device) * max(1, REGISTERS // (32 * sizes.num_warps * sizes.registers))
    chunk = min(most_chunk, triton.cdiv(tokens, resident))
    return dataclasses.replace(sizes, programs=min(triton.cdiv(tokens, chunk), resident), chunk=chunk)


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
