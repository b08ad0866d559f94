"""Which numbers can be computed with, whatever the model's dtype, and the unit in which a table row is stored.

Tables hold rows in the model's dtype, and float16 knows no number between 0 and 6e-8. So a row is stored in units of a
power of two that brings its largest number just below the largest float16; tokens multiply the unit back in. Powers of
two cost no digit: what is stored differs from the row by one rounding to the table's dtype, relative to the row's
largest number, however small or large the numbers of the request are.
"""

import math

MAX_VALUE = 65504.0  # the largest float16: whatever the model's dtype, its stream can hold what we let through
MIN_VALUE = 2.0**-110  # 7.7e-34: what adds less needs a coefficient below the smallest normal float32, 2**-126


def fault_of_range(value: float) -> str | None:
    """What is wrong with a program whose largest number, not zero, is `value`; None if nothing is."""
    if not value <= MAX_VALUE:
        return f"values reach {value:g}, more than the {MAX_VALUE:g} that every model dtype can hold"
    if value < MIN_VALUE:
        return f"adds {value:g} at most, less than the {MIN_VALUE:.2g} that can be computed with: leave it out"
    return None


def unit_of(largest: float) -> float:
    """The power of two by which a row with this largest number just fits into float16: to 65504, or half of it."""
    if not largest:
        return 1.0
    fraction, exponent = math.frexp(largest)
    return math.ldexp(1.0, exponent - (16 if fraction * 2.0**16 <= MAX_VALUE else 15))
