"""Device functions that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def opening(score, threshold, sharpness):  # type: ignore[no-untyped-def]
    """A gate in [0, 1] made of a probe score."""
    return tl.sigmoid(sharpness * (score - threshold))


@triton.jit
def decode_only(gate, decode):  # type: ignore[no-untyped-def]
    """A gate that acts on decode tokens (mask 1) and is 1 for prefill tokens (mask 0)."""
    return decode * gate + (1.0 - decode)


@triton.jit
def offset(number, stride):  # type: ignore[no-untyped-def]
    """The 64-bit offset of element `number` of a dimension. That neither is negative saves most of a multiplication."""
    tl.assume(number >= 0)
    tl.assume(stride >= 0)
    return number.to(tl.int64) * stride
