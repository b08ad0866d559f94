"""A float32 row in rows of a table that has fewer digits: 8 of its 24 binary digits in each of three.

    w = high + middle + low,    each the rounding of what is left to `DIGITS` binary digits

A table in bfloat16 holds each of them as it is. Each is stored in a unit that is 2^-8 times that of the one before it,
so that whoever reads them puts them together again by numbers that are the same for all rows.
"""

import numpy as np
import numpy.typing as npt

from trimtab.responses import DIGITS

Array = npt.NDArray[np.float64]


def digits(values: Array, place: int) -> Array:
    """Row `place`, from 0, of those that hold `values`, of any shape: no number has more than `DIGITS` digits."""
    left = values
    for _ in range(place):
        left = left - _rounded(left)
    return _rounded(left)


def share(place: int) -> float:
    """The unit of row `place`, in that of the first."""
    return 2.0 ** (-DIGITS * place)


def _rounded(values: Array) -> Array:
    fractions, exponents = np.frexp(values)
    result: Array = np.ldexp(np.round(fractions * 2.0**DIGITS), exponents - DIGITS)
    return result
