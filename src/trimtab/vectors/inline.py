"""Vectors written out in a request: per hook point either a packed array or plain lists of numbers.

    {"post_block": {"dtype": "float16", "shape": [n, H], "layer_indices": [n layers], "data": base64 or bytes}}
    {"post_block": {"14": [H numbers], "15": [H numbers]}}

Packed arrays are little-endian float16, float32 or bfloat16 in C order. They are the form for a server: a vector of 32
layers of width 4096 is read, checked and named by its digest in under a millisecond.
"""

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pybase64

from trimtab.errors import SteeringError
from trimtab.sites import LAYERS_BELOW, HookPoint, Site
from trimtab.vectors.values import FloatArray, as_direction, largest
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown, summary, with_suggestions

MAX_INLINE_BYTES = 16 << 20  # float32 bytes in one vector: six hooks in 80 layers of width 8192 take 15 MiB

MAX_LAYERS = 1024  # more than any model has: it bounds the work that a request can ask for

_PIECE = 1 << 14  # numbers converted at once: more would start torch's threads, after which a process must not fork

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_PACKED_KEYS = ("dtype", "shape", "layer_indices", "data")


def parse_inline(value: Mapping[Any, Any]) -> SteeringVector:
    """The vector of an inline object. Raises `SteeringError` with the path inside that object."""
    if not value:
        raise SteeringError("", f"names no hook point: want at least one of {_hook_names()}")
    sites: list[Site] = []
    blocks: list[FloatArray] = []
    peak = 0.0
    for name, body in value.items():
        hook = _hook(name)
        if not isinstance(body, Mapping):
            raise SteeringError(hook, f"got {type(body).__name__}, want a packed array or an object of layers")
        packed = any(key in body for key in _PACKED_KEYS)
        layers, block, largest_here = _packed(body, hook) if packed else _listed(body, hook)
        peak = max(peak, largest_here)
        if blocks and block.shape[1] != blocks[0].shape[1]:
            raise SteeringError(hook, f"has width {block.shape[1]}, but {sites[0].hook} has {blocks[0].shape[1]}")
        _check_size(sum(map(len, blocks)) + len(layers), block.shape[1], hook)
        sites.extend(Site(layer, hook) for layer in layers)
        blocks.append(block)
    block = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    for array in (block.base, block):  # nobody else has them: a wire form need not copy what none can write to
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return SteeringVector.from_block(sites, block, max_abs=peak)


def pack(vector: SteeringVector) -> dict[str, dict[str, Any]]:
    """The packed JSON form of a vector, in float32: what `parse_inline` reads back to the same digest."""
    packed: dict[str, dict[str, Any]] = {}
    for hook in HookPoint:
        kept = [i for i, site in enumerate(vector.sites) if site.hook is hook]
        if kept:
            data = vector.block[kept].astype("<f4", copy=False).tobytes()
            packed[hook.value] = {
                "dtype": "float32",
                "shape": [len(kept), vector.hidden_size],
                "layer_indices": [vector.sites[i].layer for i in kept],
                "data": base64.b64encode(data).decode(),
            }
    return packed


def _packed(body: Mapping[Any, Any], hook: HookPoint) -> tuple[list[int], FloatArray, float]:
    unknown = [key for key in body if key not in _PACKED_KEYS]
    if unknown:
        raise SteeringError(f"{hook}.{unknown[0]!s:.80}", f"unknown key: a packed array has {', '.join(_PACKED_KEYS)}")
    missing = [key for key in _PACKED_KEYS if key not in body]
    if missing:
        raise SteeringError(f"{hook}.{missing[0]}", "is required in a packed array")
    dtype, shape, layers, data = (body[key] for key in _PACKED_KEYS)
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise SteeringError(f"{hook}.dtype", f"got {shown(dtype)}, want one of {', '.join(_ITEM_BYTES)}")
    if not isinstance(shape, (list, tuple)) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise SteeringError(f"{hook}.shape", f"got {shown(shape)}, want [number of layers, hidden size]")
    count, width = shape
    _check_size(count, width, f"{hook}.shape")
    layers = _layers(layers, f"{hook}.layer_indices")
    if len(layers) != count:
        raise SteeringError(f"{hook}.layer_indices", f"has {len(layers)} layers, but shape says {count}")
    raw = _bytes(data, count * width * _ITEM_BYTES[dtype], f"{hook}.data")
    block = _floats(raw, dtype).reshape(count, width)
    if not math.isfinite(peak := largest(block)):
        row, column = np.argwhere(~np.isfinite(block))[0]
        place = f"number {column} of layer {layers[row]}"
        raise SteeringError(f"{hook}.data", f"{place} is {block[row, column]}, want finite numbers")
    return layers, block, peak


def _bytes(data: Any, size: int, path: str) -> bytearray:
    if isinstance(data, str):
        characters = -(-size // 3) * 4
        if len(data) != characters:
            given = f"has {len(data)} characters"
            raise SteeringError(path, f"{given}, want {characters}: base64, with padding, of {size} bytes")
        try:
            raw = pybase64.b64decode_as_bytearray(data, validate=True)
        except (binascii.Error, ValueError):
            raise SteeringError(path, "is not base64 (standard alphabet, no line breaks)") from None
    elif isinstance(data, (bytes, bytearray, memoryview)):
        raw = bytearray(data)
    else:
        raise SteeringError(path, f"got {type(data).__name__}, want a base64 string or bytes")
    if len(raw) != size:
        raise SteeringError(path, f"has {len(raw)} bytes, want {size} for this dtype and shape")
    return raw


def _floats(raw: bytearray, dtype: str) -> FloatArray:
    if dtype == "float32":
        return np.frombuffer(raw, dtype="<f4").astype(np.float32, copy=False)
    if dtype == "bfloat16":  # the upper half of a float32
        wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    import torch  # only here: NumPy takes several times as long

    half = torch.from_numpy(np.frombuffer(raw, dtype="<f2").astype(np.float16, copy=False))
    floats = torch.empty(len(half), dtype=torch.float32, device="cpu")
    for start in range(0, len(half), _PIECE):
        floats[start : start + _PIECE] = half[start : start + _PIECE]
    return floats.numpy()


def _listed(body: Mapping[Any, Any], hook: HookPoint) -> tuple[list[int], FloatArray, float]:
    _check_size(len(body), 1, hook)
    if not body:
        raise SteeringError(hook, "has no layers: want {layer: [numbers]} or a packed array")
    layers: list[int] = []
    rows: list[FloatArray] = []
    for key, numbers in body.items():
        path = f"{hook}.{key!s:.80}"
        layer = _layer_key(key, path)
        if layer in layers:
            raise SteeringError(path, f"layer {layer} is given twice")
        layers.append(layer)
        if hasattr(numbers, "__len__"):
            _check_size(len(body), len(numbers), path)
        rows.append(as_direction(numbers, path))
        if len(rows[-1]) != len(rows[0]):
            raise SteeringError(path, f"has {len(rows[-1])} numbers, but layer {layers[0]} has {len(rows[0])}")
    block = np.stack(rows)
    return layers, block, largest(block)


def _layer_key(key: Any, path: str) -> int:
    if type(key) is int and 0 <= key < LAYERS_BELOW:
        return key
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key:
        return int(key)
    raise SteeringError(path, f'{shown(key)} is not a layer: want a whole number from 0, such as "14"')


def _layers(value: Any, path: str) -> list[int]:
    if not isinstance(value, (list, tuple)):
        raise SteeringError(path, f"got {type(value).__name__}, want a list of layers")
    if (
        set(map(type, value)) <= {int}
        and len(set(value)) == len(value)
        and (not value or 0 <= min(value) <= max(value) < LAYERS_BELOW)
    ):
        return list(value)
    seen: set[int] = set()
    for index, layer in enumerate(value):
        if type(layer) is not int or not 0 <= layer < LAYERS_BELOW:
            raise SteeringError(f"{path}[{index}]", f"got {shown(layer)}, want a layer, a whole number from 0")
        if layer in seen:
            raise SteeringError(f"{path}[{index}]", f"layer {layer} is given twice")
        seen.add(layer)
    raise AssertionError("unreachable: one of the two faults was found")


def _check_size(count: int, width: int, path: str) -> None:
    if count > MAX_LAYERS * len(HookPoint):
        raise SteeringError(path, f"{count} sites are too many: no model has {MAX_LAYERS} layers")
    if count * width * 4 > MAX_INLINE_BYTES:
        limit = f"at most {MAX_INLINE_BYTES // 4} numbers may be sent with a request; register the vector instead"
        raise SteeringError(path, f"{count} x {width} numbers are too many: {limit}")


def _hook(name: Any) -> HookPoint:
    try:
        return HookPoint(name)
    except ValueError:
        hint = with_suggestions(name, [hook.value for hook in HookPoint])
        raise SteeringError(f"{name!s:.80}", f"unknown hook point{hint}; the hook points are {_hook_names()}") from None


def _hook_names() -> str:
    return summary([hook.value for hook in HookPoint])
