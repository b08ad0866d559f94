"""Device functions that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def add_pairs(a0, a1, b0, b1):  # type: ignore[no-untyped-def]
    """Two sums in one reduction."""
    return a0 + b0, a1 + b1


@triton.jit
def opening(score, threshold, sharpness, active):  # type: ignore[no-untyped-def]
    """A gate in [0, 1] made of a probe score; 1 where the monitor is off."""
    return tl.where(active, tl.sigmoid(sharpness * (score - threshold)), 1.0)


@triton.jit
def decode_only(gate, decode):  # type: ignore[no-untyped-def]
    """A gate that acts on decode tokens (mask 1) and is 1 for prefill tokens (mask 0)."""
    return decode * gate + (1.0 - decode)
