"""Counts work. A test bounds work and never seconds, which tell how busy the machine is."""

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls(function: Callable[[], Any]) -> int:
    """How many calls of Python and C functions `function` makes in this thread."""
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that `function` holds at once beyond what was held before, NumPy's arrays included."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = function()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del kept
    return peak - before
