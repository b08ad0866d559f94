"""Field types of a spec: what is taken for a number, a list of layers, a vector and a probe."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

from trimtab.errors import SteeringError
from trimtab.sites import LAYERS_BELOW
from trimtab.vectors.inline import MAX_LAYERS, pack, parse_inline
from trimtab.vectors.probe import Probe
from trimtab.vectors.values import LARGEST_FLOAT32
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown, summary

MAX_NAME_CHARACTERS = 200


def _number(value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise SteeringError("", f"got {shown(value)}, want a number")
    if not -LARGEST_FLOAT32 <= value <= LARGEST_FLOAT32:  # compares whole numbers of any size; false for NaN
        raise SteeringError("", f"got {shown(value)}, want a number that is finite in float32")
    return float(value)


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
        if (
            isinstance(layer, (bool, np.bool_))
            or not isinstance(layer, (int, np.integer))
            or not 0 <= layer < LAYERS_BELOW
        ):
            raise SteeringError(f"[{index}]", f"got {shown(layer)}, want a layer, a whole number from 0")
        if layer in seen:
            raise SteeringError(f"[{index}]", f"layer {layer} is given twice")
        seen.add(int(layer))
    return tuple(sorted(seen))


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
_SOURCE_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
Source = Annotated[str | SteeringVector, PlainValidator(_source), PlainSerializer(_dump_source), _SOURCE_SCHEMA]
ProbeSource = Annotated[str | Probe, PlainValidator(_probe), PlainSerializer(_dump_probe), _SOURCE_SCHEMA]
