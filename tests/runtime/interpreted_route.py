"""Runs `route`'s kernel in Triton's interpreter over random schedules. A program: `python interpreted_route.py`.

The interpreter replaces `triton.jit` while Triton is imported, so it cannot share a process with compiled kernels.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from route_cases import run

from trimtab.ops.kernels.route import launch_route

if __name__ == "__main__":
    found = [run(seed, 14, launch_route, (torch.int32, torch.int64)[seed % 2]) for seed in (2, 3, 10, 11)]
    tokens, by_atoms = map(sum, zip(*found, strict=True))
    assert min(tokens, by_atoms) > 100
    print("4 schedules are as due")
