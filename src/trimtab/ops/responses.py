"""What a slot makes of its score, in torch: one expression for each response of `trimtab.responses`.

The same for kernels stands in `kernels/responses.py`.
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.responses import KEEP_NORM, NORM, REPLACE, RESPONSES, Stage


def clip(u: Tensor, strength: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """strength * (min(max(u, low), high) - u): 0 within the bounds, either of which may be infinite, as u may be."""
    kept = torch.minimum(torch.maximum(u, low), high)
    return torch.where(kept == u, 0.0, strength * (kept - u))


def turn(u: Tensor, v: Tensor, own: Tensor, other: Tensor, length: Tensor, when: Tensor) -> Tensor:
    """own * u + other * v + length * |(u, v)|; 0 where `when` is 1 and u is not above 0, or it is 2 and v is not."""
    asked = torch.where(when == 1.0, u, torch.where(when == 2.0, v, 1.0))
    return torch.where(asked > 0.0, own * u + other * v + length * torch.sqrt(u * u + v * v), 0.0)


def feature(u: Tensor, threshold: Tensor, scale: Tensor, add: Tensor, low: Tensor, high: Tensor, off: Tensor) -> Tensor:
    """min(max(scale * u + add, low), high) - u where u > threshold, else `off`."""
    wanted = torch.minimum(torch.maximum(scale * u + add, low), high)
    return torch.where(u > threshold, wanted - u, off)


def by_name(*functions: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """The functions by their names. Raises `ValueError` where a response has none, or of other arguments."""
    found = {function.__name__: function for function in functions}
    for name, response in RESPONSES.items():
        if response.stage is not Stage.LOCAL:
            if response not in (REPLACE, NORM, KEEP_NORM):
                raise ValueError(f"the response {name!r} looks back, and trimtab.ops.looking_back does not compute it")
            continue
        wanted = ["u", *(["v"] if response.sees_two else []), *response.numbers]
        if name not in found or list(inspect.signature(found[name]).parameters) != wanted:
            raise ValueError(f"the response {name!r} needs the function {name}({', '.join(wanted)}) in {__name__}")
    return found


EXPRESSIONS = by_name(clip, turn, feature)


def respond(
    names: Sequence[str], codes: Tensor, u: Tensor, numbers: Sequence[Tensor], scores: Sequence[Tensor]
) -> Tensor:
    """c [N] of scores `u` [N], each by the response of its code [N] with its own `numbers`, each [N].

    `scores` are those of all slots of the site, each [N]; where a response sees a second one, the last of the numbers
    says which. Only the responses that are named are computed; where there is one of them, codes are not looked at.
    """
    seen = [u, _second(scores, numbers[-1])] if any(RESPONSES[name].sees_two for name in names) else [u]
    first, *others = names
    c = _expression(first, seen, numbers)
    for name in others:
        c = torch.where(codes == RESPONSES[name].code, _expression(name, seen, numbers), c)
    return c


def _second(scores: Sequence[Tensor], place: Tensor) -> Tensor:
    """The score at each `place` [N]: choices, since a sum would spread what is infinite."""
    chosen = scores[0]
    for number, score in enumerate(scores[1:], start=1):
        chosen = torch.where(place == number, score, chosen)
    return chosen


def _expression(name: str, seen: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    response = RESPONSES[name]
    return EXPRESSIONS[name](*seen[: 1 + response.sees_two], *numbers[: len(response.numbers)])


def gated(c: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """`c` [N] times what each token's `gate` [N], counted from 1, lets through, of `values` [G, T]; 0 is no gate."""
    result = c
    for number, value in enumerate(values.unbind(0), start=1):
        result = torch.where(gate == number, c * value[: c.shape[0]], result)
    return result
