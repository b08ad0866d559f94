"""Host cost of the runtime: planning a step, admitting a request, and sharing rows.

    python benchmarks/runtime.py [--device cuda]

Times are host microseconds, the best of several repeats of many calls: the machine's noise only ever adds. "Plan and
upload" is all of `SteeringRuntime.step`, id lookup and copies to the device included.
"""

import argparse
import base64
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trimtab.ops.buffers import SteeringBuffers
from trimtab.program import ResolvedSteering
from trimtab.runtime import SteeringRuntime
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

HIDDEN, LAYERS = 4096, 32
SITES = tuple(Site(layer, HookPoint.POST_BLOCK) for layer in (14, 15, 16))  # what a user steers: a few layers
PROMPT = 4000


def make_runtime(max_requests: int, device: str, max_tokens: int = 8192) -> SteeringRuntime:
    buffers = SteeringBuffers(
        SITES,
        hidden_size=HIDDEN,
        max_rows=1 + 2 * max_requests,
        max_tokens=max_tokens,
        dtype=torch.bfloat16,
        device=torch.device(device),
    )
    return SteeringRuntime(buffers, max_requests=max_requests)


def random_vector(seed: int) -> SteeringVector:
    numbers = np.random.default_rng(seed).standard_normal((len(SITES), HIDDEN)).astype(np.float32)
    return SteeringVector(dict(zip(SITES, numbers, strict=True)))


def resolve(spec: dict[str, object], vectors: dict[str, SteeringVector]) -> ResolvedSteering:
    return Steering.parse(spec).resolve(vectors, ModelSites(HIDDEN, LAYERS, frozenset(SITES)))


def best(call: Callable[[], object], *, calls: int = 20, repeats: int = 150) -> float:
    """Microseconds per call, the best mean of `repeats` runs of `calls` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return 1e6 * min(times)


def step_times(requests: int, device: str) -> dict[str, float]:
    """Microseconds of `step` for one batch size, per kind of batch."""
    vectors = {f"v{i}": random_vector(i) for i in range(8)}
    runtime = make_runtime(requests + 1, device)
    names = [f"request-{i}" for i in range(requests)]
    for i, name in enumerate(names):
        spec = {"interventions": [{"kind": "add", "vector": f"v{i % 8}", "scale": 0.1 + i / 100}]}
        runtime.admit(name, resolve(spec, vectors))
    ones, prompts = np.ones(requests, np.int32), np.full(requests, PROMPT, np.int32)
    positions = np.full(requests, PROMPT, np.int32)

    def decode() -> None:  # the commonest step: every request one position further
        np.add(positions, 1, out=positions)
        runtime.step(names, positions, ones, prompts)

    orders = [names, names[1:] + names[:1]]

    def changed() -> None:  # other order, hence other ids at every place: all are looked up, and the plan goes up
        orders.reverse()
        runtime.step(orders[0], positions, ones, prompts)

    chunks = np.where(np.arange(requests) % 8 == 0, max(1, 6000 // max(1, requests // 8) // 2), 1).astype(np.int32)
    starts = [np.where(chunks > 1, PROMPT - chunks // 2 - shift, PROMPT + 50).astype(np.int32) for shift in (0, 1)]

    def mixed() -> None:  # one request in eight brings a chunk that straddles the end of its prompt
        starts.reverse()
        runtime.step(names, np.maximum(starts[0], 0), chunks, prompts)

    strangers = [f"stranger-{i}" for i in range(requests)]

    def unsteered() -> None:  # steered requests exist, but none is in this batch
        runtime.step(strangers, positions, ones, prompts)

    result = {"steady decode": best(decode), "changed batch": best(changed), "mixed prefill": best(mixed)}
    result["mixed tokens"] = float(chunks.sum())
    result["unsteered batch"] = best(unsteered)
    for name in names:
        runtime.release(name)
    unsteered()
    result["nothing steered"] = best(unsteered)
    return result


def admission_times(device: str) -> dict[str, float]:
    """Microseconds from a request's JSON-like spec to held rows."""
    vectors = {"calm": random_vector(1)}
    runtime = make_runtime(64, device)
    named = {"interventions": [{"kind": "add", "vector": "calm", "scale": 1.5}]}

    def inline(vector: SteeringVector) -> dict[str, object]:
        packed = {
            "dtype": "float32",
            "shape": list(vector.block.shape),
            "layer_indices": [site.layer for site in vector.sites],
            "data": base64.b64encode(vector.block.tobytes()).decode(),
        }
        return {"interventions": [{"kind": "add", "vector": {"post_block": packed}}]}

    fresh = [inline(random_vector(i)) for i in range(40)]
    ready = [resolve(spec, {}) for spec in fresh]
    named_ready = resolve(named, vectors)
    turn = itertools.count()
    nobody = np.zeros(0, np.int64)

    def upload() -> None:
        small.admit("r", ready[next(turn) % len(ready)])
        small.step([], nobody, nobody, nobody)

    result = {
        "named: admit": best(lambda: runtime.admit("r", named_ready)),
        "named: parse, resolve, admit": best(lambda: runtime.admit("r", resolve(named, vectors))),
        "inline: admit": best(lambda: runtime.admit("r", ready[next(turn) % len(ready)])),
        "inline: parse, resolve, admit": best(lambda: runtime.admit("r", resolve(fresh[next(turn) % len(fresh)], {}))),
    }
    turn = itertools.count()
    small = make_runtime(8, device)  # 16 rows for 40 contents: each is evicted before it returns
    result["inline: admit, compose and upload the row"] = best(upload)
    assert small.row_uploads == next(turn)
    return result


def thousand_scales(device: str) -> tuple[float, int]:
    """Microseconds per admission of one vector at 1,000 scales, and the rows that they take."""
    vectors = {"calm": random_vector(1)}
    specs = [
        resolve({"interventions": [{"kind": "add", "vector": "calm", "scale": 0.001 * (i + 1)}]}, vectors)
        for i in range(1000)
    ]
    times = []
    for _ in range(5):
        runtime = make_runtime(1000, device, max_tokens=1024)
        start = time.perf_counter()
        for i, steering in enumerate(specs):
            runtime.admit(f"r{i}", steering)
        times.append((time.perf_counter() - start) / 1000)
        rows = runtime.rows_in_use
    return 1e6 * min(times), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    console = Console()
    table = Table("requests", title=f"step(): plan and upload, microseconds of host time ({device})")
    sizes = [1, 32, 256, 1024]
    results = [step_times(requests, device) for requests in sizes]
    for name in results[0]:
        table.add_column(name, justify="right")
    for requests, result in zip(sizes, results, strict=True):
        table.add_row(
            str(requests), *(f"{value:.0f}" if "tokens" in key else f"{value:.1f}" for key, value in result.items())
        )
    console.print(table)
    table = Table("admission", "microseconds", title=f"{len(SITES)} sites x {HIDDEN}, float32 inline vectors")
    for name, value in admission_times(device).items():
        table.add_row(name, f"{value:.1f}")
    per_admission, rows = thousand_scales(device)
    table.add_row("one vector at 1,000 scales, each", f"{per_admission:.1f}")
    console.print(table)
    console.print(f"1,000 admissions of one vector at 1,000 scales: {rows} row")


if __name__ == "__main__":
    main()
