"""With the host several steps ahead of a busy device, each forward pass still reads its own step's state."""

import numpy as np
import pytest
import torch
from runtime_model import SITES, make_buffers, resolved, vector

from trimtab.runtime import SteeringRuntime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 12
SLEEP_CYCLES = 200_000_000  # about 0.1 s: copies queued behind it wait while the host goes on


def test_staging_is_not_overwritten_while_a_copy_waits_for_the_device():
    buffers = make_buffers(16, device="cuda")
    runtime = SteeringRuntime(buffers, max_requests=16)
    canary = torch.zeros(64, dtype=torch.int64).pin_memory()  # staged without a guard

    def run(vectors):
        seen, canaries = [], []
        for step, one in enumerate(vectors):
            name = f"r{step}"
            runtime.admit(name, resolved([(one, 1.0 + step)], [(one, 1.0 + step)]))
            runtime.step([name], np.array([step]), np.array([step + 1]), np.array([STEPS + step]))
            seen.append([tensor.clone() for tensor in (buffers.table, buffers.token_slab, buffers.any_active)])
            canary.fill_(step)
            canaries.append(canary.to("cuda", non_blocking=True))
            runtime.release(name)
        return seen, canaries

    first, vectors = ([vector(seed, SITES if seed % 2 else SITES[1:]) for seed in range(n, n + STEPS)] for n in (0, 50))
    warm = run(first)  # loading kernels and growing memory pools would wait for the device
    torch.cuda.synchronize()
    del warm
    torch.cuda._sleep(SLEEP_CYCLES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen, canaries = run(vectors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert int(canaries[0][0]) != 0, "the device was never behind, so this run proves nothing"
    for step, (one, (table, slab, flags)) in enumerate(zip(vectors, seen, strict=True)):
        index = slab.view(torch.int64)[: step + 1, 0].cpu()
        gates = slab.view(torch.float32)[: step + 1, 4].cpu()
        assert len(set(index.tolist())) == 1
        assert len(set(gates.tolist())) == 1
        assert not slab.view(torch.int64)[step + 1 :, 0].any()
        for at, site in enumerate(SITES):
            want = one.directions.get(site, np.zeros(table.shape[2], np.float32))
            # Rows are stored in units of a power of two, so their product with the coefficient is exact.
            row = table[at, int(index[0])].double().cpu().numpy()
            np.testing.assert_array_equal(row * float(gates[0]), want.astype(np.float64) * (1.0 + step))
            assert bool(flags[at, 0]) == (site in one.directions)


def test_cpu_and_cuda_end_with_the_same_bytes():
    ends = []
    for device in ("cpu", "cuda"):
        buffers = make_buffers(4, dtype=torch.bfloat16, device=device)
        runtime = SteeringRuntime(buffers, max_requests=4)
        for turn in range(40):
            name = f"r{turn % 3}"
            runtime.admit(name, resolved([(vector(turn % 11), 0.5)], [(vector(turn % 7), 1.0), (vector(99), turn)]))
            runtime.step([name, "r0"], np.array([5, 9]), np.array([9, turn % 5]), np.array([8, 9]))
        ends.append([t.cpu() for t in (buffers.table, buffers.token_slab, buffers.any_active)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
