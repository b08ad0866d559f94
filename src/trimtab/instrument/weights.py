"""Which modules hold a weight matrix, however it is kept.

Quantised modules keep their weights in buffers (GPTQ, AWQ), in packed objects of the runtime (`torch.ao`'s dynamic
int8), or in attributes that PyTorch does not know of. Norms, dropouts and activations hold vectors at most.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_INTERNAL = frozenset(nn.Module().__dict__) | {"_hf_hook"}  # an offloading hook holds the weights of the whole model
_SIZES = ("in_features", "infeatures")


def has_matrix(module: nn.Module) -> bool:
    """Whether a module, or one inside it, holds a weight of two or more dimensions in any form."""
    return any(_is_matrix(inner) for inner in module.modules())


def holds_packed(module: nn.Module) -> bool:
    """Whether a module, or one inside it, keeps a weight elsewhere than in parameters, as quantised ones do."""
    return any(_packed(inner) for inner in module.modules())


def _is_matrix(module: nn.Module) -> bool:
    sized = any(hasattr(module, name) for name in _SIZES)
    return sized or any(weight.dim() >= 2 for weight in module.parameters(recurse=False)) or _packed(module)


def _packed(module: nn.Module) -> bool:
    attributes = [value for name, value in vars(module).items() if name not in _INTERNAL]
    return any(buffer.dim() >= 2 for buffer in module.buffers(recurse=False)) or any(map(_packs_matrix, attributes))


def _packs_matrix(value: Any) -> bool:
    """Whether an attribute is a matrix, a packed object of the runtime, or an object or container that holds one."""
    if isinstance(value, nn.Module):
        return False  # it is looked at by itself
    return any(
        isinstance(item, torch.ScriptObject) or (isinstance(item, torch.Tensor) and item.dim() >= 2)
        for item in _with_contents(value)
    )


def _with_contents(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif not isinstance(value, (type, torch.Tensor, torch.ScriptObject)):
        yield from getattr(value, "__dict__", {}).values()
