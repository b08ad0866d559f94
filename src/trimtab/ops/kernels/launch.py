"""What every kernel launch shares: arguments by name, sizes of the launch, and the device it runs on."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

MAX_WIDTH = 16384
"""Widest row that one program holds in registers."""


@dataclass(frozen=True)
class Launch:
    """Sizes of one launch. All but `programs` select a compiled variant."""

    block: int  # elements of a row held at once, a power of two
    num_warps: int
    registers: int | None  # upper bound per thread; None leaves it to the compiler
    programs: int  # each walks the tokens with this stride


def launch_sizes(width: int, tokens: int, device: torch.device) -> Launch:
    """The launch for N `tokens` of `width` H. What selects a variant depends on `width` alone.

    A program takes one token at a time and holds its row at 8 elements per thread, one 16-byte load of bfloat16; a
    16384-wide row at 32, because more threads than 512 would leave each too few registers. The grid is bounded, so a
    flag that is off costs a few waves of one load and not a program per token.
    """
    block = triton.next_power_of_2(width)
    num_warps = min(32 if block <= 8192 else 16, max(1, block // 256))
    return Launch(block, num_warps, None, min(tokens, multiprocessors(device) * (64 // num_warps)))


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
