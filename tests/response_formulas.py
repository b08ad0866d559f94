"""What `trimtab.responses` says of each response that acts on scores, in float64: the oracle of all tests.

Tests on a GPU machine import this, so it imports NumPy alone.
"""

import numpy as np


def clip(u: float, strength: float, low: float, high: float) -> float:
    return strength * (min(max(u, low), high) - u)


def turn(u: float, v: float, own: float, other: float, length: float, when: float) -> float:
    return own * u + other * v + length * np.hypot(u, v) if (1.0, u, v)[int(when)] > 0 else 0.0


def feature(u: float, threshold: float, scale: float, add: float, low: float, high: float, off: float) -> float:
    return min(max(scale * u + add, low), high) - u if u > threshold else off


FORMULAS = {function.__name__: function for function in (clip, turn, feature)}
