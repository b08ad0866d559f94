"""What a slot makes of its score, in Triton: a function for each response, as `ops/responses.py` has them in torch."""

import triton
import triton.language as tl

from trimtab.responses import CLIP

CLIP_CODE = tl.constexpr(CLIP.code)


@triton.jit
def clip(u, strength, low, high):  # type: ignore[no-untyped-def]
    """0 within the bounds, where the difference of infinities would be NaN."""
    kept = tl.minimum(tl.maximum(u, low), high)
    return tl.where(kept == u, 0.0, strength * (kept - u))


@triton.jit
def respond(code, u, p_numbers, stride, mask):  # type: ignore[no-untyped-def]
    """c of each score by the response of its code; the response's own numbers lie `stride` apart."""
    first = tl.load(p_numbers, mask=mask, other=0.0)
    second = tl.load(p_numbers + stride, mask=mask, other=0.0)
    third = tl.load(p_numbers + 2 * stride, mask=mask, other=0.0)
    return tl.where(code == CLIP_CODE, clip(u, first, second, third), 0.0)
