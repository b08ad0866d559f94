"""Field types of a spec: what is taken for a number, a number per layer, places, a vector and a probe."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from trimtab.errors import SteeringError
from trimtab.sites import LAYERS_BELOW, HookPoint, in_order
from trimtab.spec.faults import join
from trimtab.vectors.inline import MAX_LAYERS, pack, parse_inline
from trimtab.vectors.probe import Probe
from trimtab.vectors.values import LARGEST_FLOAT32
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown, summary, with_suggestions

MAX_NAME_CHARACTERS = 200
MAX_RANK = 64  # vectors that a field with several may have


def _number(value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise SteeringError("", f"got {shown(value)}, want a number")
    if not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:  # compares whole numbers of any size; false for NaN
        raise SteeringError("", f"got {shown(value)}, want a number that is finite in float32")
    return float(value)


class ByLayer(NamedTuple):
    """A number for each of some layers, in their order."""

    pairs: tuple[tuple[int, float], ...]


def _number_or_by_layer(value: Any) -> float | ByLayer:
    if isinstance(value, ByLayer):
        return value
    if not isinstance(value, Mapping):
        return _number(value)
    if not value:
        raise SteeringError("", "is empty: give a number, or one for each layer")
    if len(value) > MAX_LAYERS:
        raise SteeringError("", f"has {len(value)} layers, at most {MAX_LAYERS} are allowed")
    numbers: dict[int, float] = {}
    for key, number in value.items():
        layer = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 10 else key
        _check_layer(layer, "", "as key")
        if layer in numbers:
            raise SteeringError("", f"layer {layer} is given twice")
        try:
            numbers[int(layer)] = _number(number)
        except SteeringError as error:
            raise SteeringError(str(layer), error.message) from None
    return ByLayer(tuple(sorted(numbers.items())))


def _check_layer(value: Any, path: str, where: str = "") -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not whole or not 0 <= value < LAYERS_BELOW:
        raise SteeringError(path, f"got {shown(value)}{where and ' ' + where}, want a layer, a whole number from 0")


def _source(value: Any) -> str | SteeringVector:
    if isinstance(value, SteeringVector):
        return value
    if isinstance(value, str):
        if not 0 < len(value) <= MAX_NAME_CHARACTERS:
            raise SteeringError("", f"a name has 1 to {MAX_NAME_CHARACTERS} characters, this one has {len(value)}")
        return value
    if isinstance(value, Mapping):
        return parse_inline(value)
    raise SteeringError("", f"got {type(value).__name__}, want a registered name, a packed object or a SteeringVector")


def _list_of(value: Any, what: str, read: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise SteeringError("", f"got {type(value).__name__}, want a list of {what}")
    if not 0 < len(value) <= MAX_RANK:
        raise SteeringError("", f"has {len(value)} items, want 1 to {MAX_RANK}")
    found = []
    for index, one in enumerate(value):
        try:
            found.append(read(one))
        except SteeringError as error:
            raise SteeringError(join(f"[{index}]", error.field), error.message) from None
    return tuple(found)


def _probe(value: Any) -> str | Probe:
    if isinstance(value, Probe):
        return value
    bias: Any = 0.0
    if isinstance(value, Mapping) and "bias" in value:
        bias, value = value["bias"], {key: item for key, item in value.items() if key != "bias"}
    probe = _source(value)
    if isinstance(probe, str):
        return probe
    if len(probe.sites) != 1:
        raise SteeringError("", f"a probe is read at one site, this one has {summary(list(map(str, probe.sites)))}")
    return Probe(probe, bias)


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, range)):
        raise SteeringError("", f"got {type(value).__name__}, want a list of layers")
    if not value:
        raise SteeringError("", "is empty, so nothing would be steered: name a layer or leave it out")
    if len(value) > MAX_LAYERS:
        raise SteeringError("", f"has {len(value)} layers, at most {MAX_LAYERS} are allowed")
    seen: set[int] = set()
    for index, layer in enumerate(value):
        _check_layer(layer, f"[{index}]")
        if layer in seen:
            raise SteeringError(f"[{index}]", f"layer {layer} is given twice")
        seen.add(int(layer))
    return tuple(sorted(seen))


def _hooks(value: Any) -> tuple[HookPoint, ...]:
    names = [hook.value for hook in HookPoint]
    if not isinstance(value, (list, tuple)):
        raise SteeringError("", f"got {type(value).__name__}, want a list of hook points")
    if not value:
        raise SteeringError("", "is empty, so nothing would be steered: name a hook point or leave it out")
    for index, hook in enumerate(value):
        if not isinstance(hook, str) or hook not in names:
            hint = with_suggestions(hook, names)
            raise SteeringError(f"[{index}]", f"got {shown(hook)}{hint}, want one of {', '.join(names)}")
        if hook in value[:index]:
            raise SteeringError(f"[{index}]", f"{hook} is given twice")
    return in_order(map(HookPoint, value))


def _dump_by_layer(value: float | ByLayer) -> Any:
    return {str(layer): number for layer, number in value.pairs} if isinstance(value, ByLayer) else value


def _dump_source(value: str | SteeringVector) -> Any:
    return value if isinstance(value, str) else pack(value)


def _dump_probe(value: str | Probe) -> Any:
    if isinstance(value, str):
        return value
    return pack(value.vector) | ({"bias": value.bias} if value.bias else {})


Number = Annotated[float, PlainValidator(_number), WithJsonSchema({"type": "number"})]
Layers = Annotated[
    tuple[int, ...],
    PlainValidator(_layers),
    PlainSerializer(list, return_type=list[int]),
    WithJsonSchema({"type": "array", "items": {"type": "integer"}}),
]
NumberOrByLayer = Annotated[
    float | ByLayer,
    PlainValidator(_number_or_by_layer),
    PlainSerializer(_dump_by_layer),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "object", "additionalProperties": {"type": "number"}}]}),
]
Hooks = Annotated[
    tuple[HookPoint, ...],
    PlainValidator(_hooks),
    PlainSerializer(lambda hooks: [hook.value for hook in hooks], return_type=list[str]),
    WithJsonSchema({"type": "array", "items": {"type": "string", "enum": [hook.value for hook in HookPoint]}}),
]
_SOURCE_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
Source = Annotated[str | SteeringVector, PlainValidator(_source), PlainSerializer(_dump_source), _SOURCE_SCHEMA]
Sources = Annotated[
    tuple[str | SteeringVector, ...],
    PlainValidator(lambda value: _list_of(value, "vectors", _source)),
    PlainSerializer(lambda sources: [_dump_source(source) for source in sources]),
    WithJsonSchema({"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}),
]
Numbers = Annotated[
    tuple[float, ...],
    PlainValidator(lambda value: _list_of(value, "numbers", _number)),
    PlainSerializer(list, return_type=list[float]),
    WithJsonSchema({"type": "array", "items": {"type": "number"}}),
]
ProbeSource = Annotated[str | Probe, PlainValidator(_probe), PlainSerializer(_dump_probe), _SOURCE_SCHEMA]
