"""What a slot makes of its score, in Triton: a function for each response, as `ops/responses.py` has them in torch."""

import triton
import triton.language as tl

from trimtab.responses import CLIP, FEATURE, KEEP_NORM, NORM, REPLACE, RESPONSES, TURN

CLIP_CODE = tl.constexpr(CLIP.code)
TURN_CODE = tl.constexpr(TURN.code)
# The least code of a response that sees two scores.
SEES_TWO = tl.constexpr(min(response.code for response in RESPONSES.values() if response.sees_two))
FEATURE_CODE = tl.constexpr(FEATURE.code)
REPLACE_CODE = tl.constexpr(REPLACE.code)
NORM_CODE = tl.constexpr(NORM.code)
KEEP_NORM_CODE = tl.constexpr(KEEP_NORM.code)


@triton.jit
def clip(u, strength, low, high):  # type: ignore[no-untyped-def]
    """0 within the bounds, where the difference of infinities would be NaN."""
    kept = tl.minimum(tl.maximum(u, low), high)
    return tl.where(kept == u, 0.0, strength * (kept - u))


@triton.jit
def turn(u, v, own, other, length, when):  # type: ignore[no-untyped-def]
    """0 where `when` is 1 and u is not above 0, or it is 2 and v is not."""
    asked = tl.where(when == 1.0, u, tl.where(when == 2.0, v, 1.0))
    return tl.where(asked > 0.0, own * u + other * v + length * tl.sqrt(u * u + v * v), 0.0)


@triton.jit
def feature(u, threshold, scale, add, low, high, off):  # type: ignore[no-untyped-def]
    """`off` where u is not above its threshold."""
    wanted = tl.minimum(tl.maximum(scale * u + add, low), high)
    return tl.where(u > threshold, wanted - u, off)


@triton.jit
def respond(code, u, p_numbers, stride, mask):  # type: ignore[no-untyped-def]
    """c of each score by the response of its code; the response's own numbers lie `stride` apart."""
    first = tl.load(p_numbers, mask=mask, other=0.0)
    second = tl.load(p_numbers + stride, mask=mask, other=0.0)
    third = tl.load(p_numbers + 2 * stride, mask=mask, other=0.0)
    return tl.where(code == CLIP_CODE, clip(u, first, second, third), 0.0)


@triton.jit
def respond_to_two(c, code, u, v, p_numbers, stride, mask):  # type: ignore[no-untyped-def]
    """`c`, but of responses that see a second score `v`."""
    first = tl.load(p_numbers, mask=mask, other=0.0)
    second = tl.load(p_numbers + stride, mask=mask, other=0.0)
    third = tl.load(p_numbers + 2 * stride, mask=mask, other=0.0)
    fourth = tl.load(p_numbers + 3 * stride, mask=mask, other=0.0)
    return tl.where(code == TURN_CODE, turn(u, v, first, second, third, fourth), c)


@triton.jit
def respond_to_feature(c, code, u, p_numbers, stride):  # type: ignore[no-untyped-def]
    """`c`, but of responses that read to the digits of float32."""
    mask = code == FEATURE_CODE
    first = tl.load(p_numbers, mask=mask, other=0.0)
    second = tl.load(p_numbers + stride, mask=mask, other=0.0)
    third = tl.load(p_numbers + 2 * stride, mask=mask, other=0.0)
    fourth = tl.load(p_numbers + 3 * stride, mask=mask, other=0.0)
    fifth = tl.load(p_numbers + 4 * stride, mask=mask, other=0.0)
    sixth = tl.load(p_numbers + 5 * stride, mask=mask, other=0.0)
    return tl.where(mask, feature(u, first, second, third, fourth, fifth, sixth), c)
