"""Runs `route`'s kernel in Triton's interpreter over random schedules. A program: `python interpreted_route.py`.

The interpreter replaces `triton.jit` while Triton is imported, so it cannot share a process with compiled kernels.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from route_cases import alone, run, widest
from spans_model import due

from trimtab.ops.kernels.route import launch_route

if __name__ == "__main__":
    found = [run(seed, 10, launch_route, (torch.int32, torch.int64)[seed % 2]) for seed in (4, 5, 6, 8)]
    spans, text = widest(5), [3, *range(16, 0, -1), *[50] * 120, *[101] * 16, *range(16, 0, -1), *[7] * 40]
    expected = [due(spans, text, position) for position in range(len(text))]
    assert alone(spans, text, 0, len(text), launch_route) == expected  # in several blocks, begun in the prompt
    assert min(map(sum, zip(*found, strict=True))) > 50
    print("4 schedules are as due")
