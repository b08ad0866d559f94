"""How the strength of an intervention changes over an answer: a factor of each of its tokens, by its place alone.

    factor(i) = 2^(rate * i) * clip((i + offset) / length, 0, 1)        i = 0 for the answer's first token

in float32. A decay by d has the rate log2(d); a ramp over [a, b) has the factor (i - a + 1) / (b - a) within, 0 before
and 1 behind. Where a token is known, nothing else decides: recomputed, it has the same factor.
"""

import math
import struct
from typing import NamedTuple

import numpy as np

LONGEST_RAMP = 1 << 24  # tokens: whole numbers that float32 holds
LEAST_DECAY = 2.0**-64


class Schedule(NamedTuple):
    """The three numbers of the formula, all of them float32."""

    rate: float = 0.0  # at most 0
    offset: float = 1.0
    length: float = 1.0  # above 0

    @classmethod
    def decay(cls, by: float) -> "Schedule":
        """`by` to the power of i."""
        return cls(rate=float(np.float32(math.log2(by))) + 0.0)

    @classmethod
    def ramp(cls, first: int, end: int) -> "Schedule":
        """From 1 / (end - first) at `first` to 1 just before `end`."""
        return cls(offset=1.0 - first, length=float(end - first))

    def factor(self, token: int) -> float:
        """That of one token of the answer; computed in float64."""
        return float(2.0 ** (self.rate * token) * min(max((token + self.offset) / self.length, 0.0), 1.0))

    @property
    def is_one(self) -> bool:
        """Whether the factor is 1 everywhere."""
        return self.rate == 0.0 and self.offset >= self.length

    @property
    def fault(self) -> str:
        """What is wrong with the numbers; "" if nothing is."""
        if not all(math.isfinite(number) and float(np.float32(number)) == number for number in self):
            return "want numbers of float32"
        if not -64.0 <= self.rate <= 0.0:
            return f"the rate is {self.rate:g}, want -64 to 0"
        if not 0.0 < self.length <= LONGEST_RAMP or not 1 - LONGEST_RAMP <= self.offset <= 1.0:
            return f"the ramp has the offset {self.offset:g} and the length {self.length:g}, which no request has"
        return ""

    @property
    def packed(self) -> bytes:
        """Its numbers for digests."""
        return struct.pack("<3f", *self)
