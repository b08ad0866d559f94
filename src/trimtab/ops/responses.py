"""What a slot makes of its score, in torch: one expression for each response of `trimtab.responses`.

The same for kernels stands in `kernels/responses.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.responses import CLIP, RESPONSES


def clip(u: Tensor, strength: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """strength * (min(max(u, low), high) - u): 0 within the bounds, either of which may be infinite, as u may be."""
    kept = torch.minimum(torch.maximum(u, low), high)
    return torch.where(kept == u, 0.0, strength * (kept - u))


EXPRESSIONS: dict[str, Callable[..., Tensor]] = {CLIP.name: clip}


def respond(names: Sequence[str], codes: Tensor, u: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """c [N] of scores `u` [N], each by the response of its code [N] with its own `numbers`, each [N].

    Only the responses that are named are computed; where there is one of them, codes are not looked at.
    """
    first, *others = names
    c = _expression(first, u, numbers)
    for name in others:
        c = torch.where(codes == RESPONSES[name].code, _expression(name, u, numbers), c)
    return c


def _expression(name: str, u: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    return EXPRESSIONS[name](u, *numbers[: len(RESPONSES[name].numbers)])
