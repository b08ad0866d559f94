"""What is taken for a value in a wire form: each raises `SteeringError` at its path for anything else."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from trimtab.errors import SteeringError
from trimtab.sites import LAYERS_BELOW, HookPoint, Site
from trimtab.wording import shown

LARGEST_FLOAT64 = float(np.finfo(np.float64).max)


def index_of(value: Any, count: int, what: str, path: str) -> int:
    """The index of one of `count`."""
    if type(value) is not int or not 0 <= value < count:
        raise SteeringError(path, f"got {shown(value)}, want the index of one of {count} {what}")
    return value


def number_of(value: Any, path: str) -> float:
    """A finite number."""
    if type(value) not in (float, int) or not abs(value) <= LARGEST_FLOAT64:  # float32 cannot hold every merged scale
        raise SteeringError(path, f"got {shown(value)}, want a finite number")
    return float(value)


def truth_of(value: Any, path: str) -> bool:
    """True or false."""
    if type(value) is not bool:
        raise SteeringError(path, f"got {shown(value)}, want true or false")
    return value


def check_keys(entry: Any, path: str, wanted: Set[str]) -> None:
    """An object with exactly these keys."""
    if not isinstance(entry, Mapping):
        raise SteeringError(path, f"got {type(entry).__name__}, want an object with {', '.join(sorted(wanted))}")
    if set(entry) != wanted:
        raise SteeringError(path, f"has the keys {sorted(map(str, entry))}, want {sorted(wanted)}")


def list_of(value: Any, path: str) -> list[Any]:
    """A list."""
    if not isinstance(value, (list, tuple)):
        raise SteeringError(path, f"got {type(value).__name__}, want a list")
    return list(value)


def parts_of(value: Any, path: str, *names: str) -> list[Any]:
    """A list with one item for each of `names`."""
    parts = list_of(value, path)
    if len(parts) != len(names):
        raise SteeringError(path, f"has {len(parts)} items, want [{', '.join(names)}]")
    return parts


def layer_of(value: Any, path: str) -> int:
    """A layer."""
    if type(value) is not int or not 0 <= value < LAYERS_BELOW:
        raise SteeringError(path, f"got {shown(value)}, want a layer, a whole number from 0")
    return value


def hook_of(value: Any, path: str) -> HookPoint:
    """A hook point."""
    if not isinstance(value, str) or value not in HookPoint.__members__.values():
        raise SteeringError(path, f"got {shown(value)}, want a hook point")
    return HookPoint(value)


def site_of(value: Any, path: str) -> Site:
    """A site as [layer, hook]."""
    pair = list_of(value, path)
    if len(pair) != 2 or not isinstance(pair[1], str) or pair[1] not in HookPoint.__members__.values():
        raise SteeringError(path, f"got {shown(value)}, want [layer, hook]")
    return Site(layer_of(pair[0], f"{path}[0]"), HookPoint(pair[1]))
