"""What vLLM's n-gram speculator needs that the tests' platform does not have, in plain Python.

V1's is Python that numba makes fast, and its tokens are compared in an operator that only vLLM's CPU build has.
"""

import importlib.util
import sys
from types import ModuleType

import torch
import vllm

KERNEL = "rejection_greedy_sample_kernel_impl"
SCHEMA = f"{KERNEL}(Tensor(a!) out, Tensor ends, Tensor guesses, Tensor own, Tensor after, Tensor? _, int most) -> ()"

_libraries = []


def can_guess():
    """Whether both runners of this vLLM have such a speculator: V2 has none before 0.32."""
    return tuple(map(int, vllm.__version__.split(".")[:2])) >= (0, 32)


def make_guessing_possible():
    """Put in what is missing, and nothing else."""
    if importlib.util.find_spec("numba") is None:
        numba = ModuleType("numba")
        numba.jit = numba.njit = lambda *args, **options: args[0] if args else lambda function: function
        numba.prange, numba.get_num_threads, numba.set_num_threads = range, lambda: 1, lambda count: None
        sys.modules["numba"] = numba
    if not hasattr(torch.ops._C, KERNEL):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(SCHEMA)
        library.impl(KERNEL, reject_greedily, "CompositeExplicitAutograd")
        _libraries.append(library)


def reject_greedily(out, ends, guesses, own, after, _, most):
    """Of each request the model's own token in the place of each guess, up to the first that was wrong; where none was,
    the one `after` them too. `out` is [requests, 1 + most]."""
    for request, end in enumerate(ends.tolist()):
        start = int(ends[request - 1]) if request else 0
        wrong = (guesses[start:end] != own[start:end]).nonzero()
        kept = int(wrong[0]) + 1 if len(wrong) else end - start
        out[request, :kept] = own[start : start + kept]
        if not len(wrong):
            out[request, kept] = after[request].reshape(())
