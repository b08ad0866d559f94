"""GGUF control vectors, as llama.cpp, repeng and EasySteer write them.

The tensor `direction.N` is added to the output of block N, blocks counting from 0: our `post_block:N`. (llama.cpp
subtracts 1 from N when it loads and again when it applies, so nothing is shifted.) llama.cpp starts at N = 1 and cannot
express block 0: such a vector is read here, and written only on request.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import Content, VectorMetadata, Writable

ARCHITECTURES = ("controlvector", "steeringvector")  # the second is what dialz writes

_PREFIX = "direction."
_MOST_READS = 50_000  # a field or tensor takes three to six: enough for 128 layers and any metadata


def read_gguf(path: Path) -> Content:
    """The vector of a GGUF file; its metadata may be missing. Raises `SteeringError` for tensors of other names."""
    reader = _bounded_reader()(path)
    strings = {
        key: str(field.contents())
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and len(field.types) == 1
    }
    architecture = strings.pop("general.architecture", ARCHITECTURES[0])
    if architecture not in ARCHITECTURES:
        wanted = " or ".join(ARCHITECTURES)
        raise SteeringError("general.architecture", f"is {architecture!r:.80}, a control vector has {wanted}")
    directions = {}
    for tensor in reader.tensors:
        site = _site(tensor.name)
        if tensor.tensor_type.name not in ("F32", "F16", "F64", "BF16"):
            raise SteeringError(tensor.name, f"is stored as {tensor.tensor_type.name}, want a plain float type")
        if len(tensor.shape) != 1:
            raise SteeringError(tensor.name, f"has shape {tensor.shape.tolist()}, want [hidden_size]")
        if site in directions:
            raise SteeringError(tensor.name, "is given twice")
        plain = tensor.tensor_type.name in ("F32", "F64")
        values = tensor.data if plain else _gguf().dequantize(tensor.data, tensor.tensor_type)
        directions[site] = np.array(values).reshape(-1)  # a copy: the file need not stay open
    known = {name: strings.pop(f"{architecture}.{name}", "") for name in ("model_hint", "method", "source")}
    metadata = VectorMetadata(known["model_hint"], known["method"], known["source"], extra=strings)
    return Content(directions, metadata)


def write_gguf(vector: Writable, path: Path, *, allow_block_zero: bool = False) -> None:
    """Write `post_block` directions for llama.cpp and its kin.

    Raises `SteeringError` for sites at other hook points, and for block 0 unless `allow_block_zero`: EasySteer and
    trimtab read it, llama.cpp refuses the file.
    """
    foreign = [site for site in vector.sites if site.hook is not HookPoint.POST_BLOCK]
    if foreign:
        raise SteeringError("", f"GGUF holds post_block directions alone, not {foreign[0]}: save as .safetensors")
    if vector.sites[0].layer == 0 and not allow_block_zero:
        remedy = "leave it out with `vector.at(...)`, or save as .safetensors"
        raise SteeringError("", f"llama.cpp cannot steer block 0, for which this vector has a direction: {remedy}")
    architecture = ARCHITECTURES[0]
    writer = _gguf().GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", vector.metadata.base_model)
    writer.add_int32(f"{architecture}.layer_count", len(vector.sites))
    writer.add_string(f"{architecture}.method", vector.metadata.method)
    writer.add_string(f"{architecture}.source", vector.metadata.source)
    for site, direction in vector.directions.items():
        writer.add_tensor(f"{_PREFIX}{site.layer}", direction)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _site(name: str) -> Site:
    number = name.removeprefix(_PREFIX)
    if not name.startswith(_PREFIX) or not (number.isascii() and number.isdecimal()) or str(int(number)) != number:
        raise SteeringError(f"tensor {name!r:.80}", f"is not named {_PREFIX}N, N being a block counted from 0")
    return Site(int(number), HookPoint.POST_BLOCK)


def _bounded_reader() -> Any:
    """The reader of the gguf package, kept from looping where a file lies about its lengths.

    That reader takes an array past the end of the file for one of empty items, 2**60 of them if the header says so.
    """

    class BoundedReader(_gguf().GGUFReader):  # type: ignore[misc]  # the package is imported only when needed
        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **more: Any) -> Any:
            self.reads += 1
            if self.reads > _MOST_READS:
                raise ValueError("it has more fields than a control vector")
            values = super()._get(offset, dtype, count, *rest, **more)
            if len(values) != count:
                raise ValueError("it ends before the content that its header announces")
            return values

    return BoundedReader


def _gguf() -> Any:
    try:
        return import_module("gguf")
    except ImportError:
        raise SteeringError("", "reading and writing GGUF takes the `gguf` package: pip install gguf") from None
