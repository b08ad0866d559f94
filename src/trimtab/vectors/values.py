"""What is taken for a site, a number and a direction wherever a caller hands one over."""

from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.wording import shown

FloatArray = npt.NDArray[np.float32]

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def largest(block: FloatArray) -> float:
    """The largest absolute value in `block`; not finite exactly if one of its numbers is not."""
    return float(max(block.max(), -block.min()))  # both are NaN where there is a NaN


def as_site(key: Any) -> Site:
    """A `Site` of a site or a plain `(layer, hook)` pair. Raises `SteeringError` where it is neither."""
    try:
        layer, hook = key
        hook = HookPoint(hook)
    except (TypeError, ValueError):
        names = ", ".join(point.value for point in HookPoint)
        raise SteeringError(
            "directions", f"{key!r} is not a site: want (layer, hook), hook being one of {names}"
        ) from None
    if isinstance(layer, (bool, np.bool_)) or not isinstance(layer, (int, np.integer)) or layer < 0:
        raise SteeringError("directions", f"{key!r} is not a site: layers are whole numbers counted from 0")
    return Site(int(layer), hook)


def as_number(value: Any, name: str) -> float:
    """A finite number, rounded to float32. Raises `SteeringError` at `name`, for a boolean too."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise SteeringError(name, f"got {shown(value)}, want a number")
    if not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:  # compares whole numbers of any size; false for NaN
        raise SteeringError(name, f"got {shown(value)}, want a number that is finite in float32")
    return float(np.float32(value))


def as_direction(value: Any, name: str) -> FloatArray:
    """One direction [H] in float32 of a list, array or tensor. Raises `SteeringError` at `name`."""
    if isinstance(value, (list, tuple)):
        plain = set(map(type, value)) <= {float, int}
        for index, item in enumerate(() if plain else value):
            if isinstance(item, (bool, np.bool_)) or not isinstance(item, (int, float, np.floating, np.integer)):
                raise SteeringError(f"{name}[{index}]", f"got {shown(item)}, want a finite number")
        try:
            array = np.array(value, dtype=np.float64)
        except OverflowError:
            raise SteeringError(name, "holds a whole number too large for float32") from None
    else:
        if hasattr(value, "detach"):  # a torch tensor: NumPy knows neither bfloat16 nor other devices
            value = value.detach().cpu()
            value = value.float().numpy() if value.is_floating_point() else value.numpy()
        array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim != 1 or array.size == 0:
        raise SteeringError(
            name, f"got an array of {array.dtype} {list(array.shape)}, want numbers of shape [hidden_size]"
        )
    with np.errstate(over="ignore"):  # what overflows is refused just below
        rounded = array.astype(np.float32)
    if not np.isfinite(rounded).all():
        index = int(np.flatnonzero(~np.isfinite(rounded))[0])
        raise SteeringError(f"{name}[{index}]", f"got {array[index]}, want a number that is finite in float32")
    return rounded


def owners(array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """`array`, what it is a view of, what that is a view of, and so on."""
    found = [array]
    while isinstance(found[-1].base, np.ndarray):
        found.append(found[-1].base)
    return found
