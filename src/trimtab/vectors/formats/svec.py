"""`.svec` files of other tools, read only: IBM's activation steering and AISteer360.

Blocks count from 0. A file does not say where its layer N acts, and its writers differ: IBM's library adds to what
*enters* block N, our `pre_attn:N`, and so do CAST and ActAdd of AISteer360, whose CAA adds to what leaves it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import Content, VectorMetadata


def read_svec(path: Path, hook: HookPoint | None = None) -> Content:
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
    return Content({Site(layer, point): row for layer, row in rows.items()}, metadata)


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
