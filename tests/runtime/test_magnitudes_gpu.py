"""Numbers of any magnitude through the kernels on a GPU: see test_magnitudes."""

import pytest
import torch
from magnitude_cases import HALF_STEP, Engine, assorted, check

from trimtab.ops import emit
from trimtab.sites import HookPoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("in_place", [False, True])
def test_kernels_add_what_was_asked_for_to_one_rounding_of_the_row(
    dtype: torch.dtype, seed: int, in_place: bool
) -> None:
    requests = assorted(seed)
    engine = Engine(requests, dtype, "cuda")
    added = [emit(layer, HookPoint.POST_BLOCK, engine.stream, in_place=in_place) for layer in engine.layers]
    check(added, requests, dtype)
