"""Folders of EasyEdit, read only: bare tensors in `layer_N.pt`. Blocks count from 0; it adds to what leaves block N."""

import re
from pathlib import Path
from typing import Any

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import Content, VectorMetadata

_LAYER_FILE = re.compile(r"layer_(0|[1-9][0-9]{0,5})\.pt")


def read_easyedit_folder(path: Path) -> Content:
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
    return Content(directions, VectorMetadata(method="CAA", source=path.name, extra=extra))
