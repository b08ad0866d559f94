"""Vectors of other tools, read only: `.svec` (IBM's activation steering, AISteer360) and EasyEdit's `layer_N.pt`.

In both, layer N means what leaves block N, blocks counting from 0: our `post_block:N`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector, VectorMetadata

_LAYER_FILE = re.compile(r"layer_(0|[1-9][0-9]{0,5})\.pt")


def read_svec(path: Path) -> SteeringVector:
    """The JSON object of a `.svec` file: `directions` maps a layer to [D] numbers, or to [1, D].

    Raises `SteeringError` for directions of several tokens ([T, D]) and for those of attention heads: neither is a
    direction of the residual stream.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, Mapping) or not isinstance(content.get("directions"), Mapping):
        raise SteeringError("directions", "is missing: a .svec file is a JSON object with directions by layer")
    if content.get("num_heads") is not None:
        raise SteeringError("num_heads", "is given, so the directions belong to attention heads, not to the stream")
    directions: dict[Site, Any] = {}
    for key, value in content["directions"].items():
        if not (key.isascii() and key.isdecimal() and len(key) < 7 and str(int(key)) == key):
            raise SteeringError(f"directions.{key:.80}", "is not a layer, a whole number from 0")
        if isinstance(value, list) and value and isinstance(value[0], list):
            if len(value) != 1:
                several = f"holds directions for {len(value)} token positions; only one direction per layer can be used"
                raise SteeringError(f"directions.{key}", several)
            value = value[0]
        directions[Site(int(key), HookPoint.POST_BLOCK)] = value
    base_model = content.get("model_type")
    metadata = VectorMetadata(base_model=base_model if isinstance(base_model, str) else "", source=path.name)
    return SteeringVector(directions, metadata)


def read_easyedit_folder(path: Path) -> SteeringVector:
    """The bare tensors [D] in `layer_N.pt` of a folder, read with torch's `weights_only`: nothing in them is executed.

    Raises `SteeringError` where there are none, or other `.pt` files whose layer cannot be told.
    """
    files = sorted(path.glob("*.pt"))
    unknown = [file.name for file in files if not _LAYER_FILE.fullmatch(file.name)]
    if not files or unknown:
        said = f"{unknown[0]!r:.80} is not named layer_N.pt" if unknown else "holds no layer_N.pt"
        raise SteeringError("", f"{said}: a folder is read as EasyEdit's, one tensor per layer")
    import torch  # only here: reading any other format leaves torch alone

    directions: dict[Site, Any] = {}
    for file in files:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise SteeringError(file.name, f"holds {type(tensor).__name__}, want one floating-point tensor")
        if tensor.ndim != 1:
            raise SteeringError(file.name, f"has shape {list(tensor.shape)}, want [hidden_size]")
        directions[Site(int(file.stem.removeprefix("layer_")), HookPoint.POST_BLOCK)] = tensor
    return SteeringVector(directions, VectorMetadata(method="CAA", source=path.name))
