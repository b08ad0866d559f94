"""Vectors of other tools, read only: `.svec` (IBM's activation steering, AISteer360) and EasyEdit's `layer_N.pt`.

Blocks count from 0 in both. EasyEdit adds to what leaves block N, our `post_block:N`. A `.svec` file does not say
where its layer N acts, and its writers differ: IBM's library adds to what *enters* block N, our `pre_attn:N`, and so do
AISteer360's CAST and ActAdd, while AISteer360's CAA adds to what leaves it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector, VectorMetadata

_LAYER_FILE = re.compile(r"layer_(0|[1-9][0-9]{0,5})\.pt")


def read_svec(path: Path, hook: HookPoint | None = None) -> SteeringVector:
    """The JSON object of a `.svec` file: `directions` maps a layer to [D] numbers, or to [1, D].

    Where layer N acts is said by `hook`, or by a key `hook_point` in the file. Without either, directions [D] are
    IBM's, the only ones of that shape, and act at `pre_attn`; of [1, D] it cannot be told. The metadata say what was
    applied. Raises `SteeringError` where it cannot be told, for directions of several tokens ([T, D]) and for those of
    attention heads: neither is a direction of the residual stream.
    """
    content = read_json(path.read_bytes())
    if not isinstance(content, Mapping) or not isinstance(content.get("directions"), Mapping):
        raise SteeringError("directions", "is missing: a .svec file is a JSON object with directions by layer")
    if content.get("num_heads") is not None:
        raise SteeringError("num_heads", "is given, so the directions belong to attention heads, not to the stream")
    rows: dict[int, Any] = {}
    nested = False
    for key, value in content["directions"].items():
        if not (key.isascii() and key.isdecimal() and len(key) < 7 and str(int(key)) == key):
            raise SteeringError(f"directions.{key:.80}", "is not a layer, a whole number from 0")
        if isinstance(value, list) and value and isinstance(value[0], list):
            if len(value) != 1:
                several = f"holds directions for {len(value)} token positions; only one direction per layer can be used"
                raise SteeringError(f"directions.{key}", several)
            value, nested = value[0], True
        rows[int(key)] = value
    point, said_by = _svec_hook(content, hook, nested)
    base_model = content.get("model_type")
    metadata = VectorMetadata(
        base_model=base_model if isinstance(base_model, str) else "",
        source=path.name,
        extra={"layer_N": f"{point.value} of block N, {said_by}"},
    )
    return SteeringVector({Site(layer, point): row for layer, row in rows.items()}, metadata)


def _svec_hook(content: Mapping[str, Any], hook: HookPoint | None, nested: bool) -> tuple[HookPoint, str]:
    """Where layers act, and who said so. Raises `SteeringError` where nobody did and the shape does not tell."""
    if "hook_point" in content:
        if content["hook_point"] not in set(HookPoint):
            said = f"is {content['hook_point']!r:.80}, want one of {', '.join(HookPoint)}"
            raise SteeringError("hook_point", said)
        told = HookPoint(content["hook_point"])
        if hook not in (None, told):
            raise SteeringError("hook_point", f"the file says {told.value}, the caller {hook}")
        return told, "as the file says"
    if hook is not None:
        return hook, "as the reader was told"
    if nested:
        raise SteeringError(
            "hook_point",
            "is missing: AISteer360 writes this shape for methods that act where block N begins (CAST, ActAdd: "
            "pre_attn) and for one that acts where it ends (CAA: post_block); say which with hook=..., or put "
            '"hook_point" into the file',
        )
    return HookPoint.PRE_ATTN, "as IBM's activation-steering applies it"


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
    extra = {"layer_N": "post_block of block N, as EasyEdit applies it"}
    return SteeringVector(directions, VectorMetadata(method="CAA", source=path.name, extra=extra))
