"""Host cost of one step of decoding, by what the requests of the batch ask for.

    python benchmarks/steps.py [--starts 5] [--json FILE]

A steady step is of the same requests as the one before it; a changed one has one of them exchanged for another, so that
all are looked up and planned anew. What is timed is all of `SteeringRuntime.step`: finding the batch again, planning
it, writing what changed, and taking over what gates decided in the step before. Cases take turns, and every start makes
all of its tensors anew; of each start the best of many repeats counts, since the machine's noise only ever adds. Device
operations are counted: each is a launch or a copy where the tensors are a GPU's. What the device decides for requests
with spans is one launch there; on a CPU it would be the host's own work, which is left out of the times and counts.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from runtime import best
from trimtab.ops.args import SlotForm
from trimtab.ops.buffers import SteeringBuffers
from trimtab.program import EMPTY, ResolvedSteering, Spans
from trimtab.responses import CLIP
from trimtab.runtime import SteeringRuntime, probes_needed, rows_needed
from trimtab.runtime import runtime as runtime_module
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

HIDDEN, MAX_TOKENS, MOST, PROMPT = 256, 8192, 4, 4000  # the width is nothing to a step without new rows
SITES = tuple(Site(layer, HookPoint.POST_BLOCK) for layer in range(32))
BATCHES = (1, 32, 256)
CASES = {  # gates and slots of each request, beside the vector that it adds, and the runs of its answer
    "rows": (0, 0, 0),
    "1 gate": (1, 0, 0),
    "4 gates": (4, 0, 0),
    "1 slot": (0, 1, 0),
    "4 slots": (0, 4, 0),
    "4 gates, 4 slots": (4, 4, 0),
    "2 spans": (0, 0, 1),
    "8 spans": (0, 0, 7),
    "8 spans, 4 gates, 4 slots": (4, 4, 7),
}


def direction(seed: int, *layers: int) -> SteeringVector:
    numbers = np.random.default_rng(seed).standard_normal((len(layers), HIDDEN)).astype(np.float32)
    return SteeringVector(dict(zip((SITES[layer] for layer in layers), numbers, strict=True)))


class Views(TorchDispatchMode):
    """Counts operations that are not mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


class Batch:
    """A running batch whose requests have all reached their answers."""

    def __init__(self, requests: int, gates: int, slots: int, runs: int) -> None:
        buffers = SteeringBuffers(
            SITES,
            hidden_size=HIDDEN,
            max_rows=rows_needed(requests + 1, gates, slots),
            max_tokens=MAX_TOKENS,
            dtype=torch.bfloat16,
            gates=gates,
            max_probes=probes_needed(requests + 1, gates),
            slots=SlotForm(slots, (CLIP.name,), writes=False) if slots else None,
            span_requests=(requests + 1) * (runs > 0),
        )
        self._runtime = SteeringRuntime(buffers, max_requests=requests + 1)
        names = [f"request-{number}" for number in range(requests)]
        for number, name in enumerate(names):
            self._runtime.admit(name, steering(number, gates, slots, runs))
        self._runtime.admit("another", steering(requests, gates, slots, runs))
        self._batches = [names, [*names[1:], "another"]]
        self._ones, self._prompts = np.ones(requests, np.int32), np.full(requests, PROMPT, np.int32)
        self._positions = self._prompts.copy()
        self._on_device = {name: torch.zeros(MAX_TOKENS, dtype=torch.int32) for name in ("positions", "token_ids")}

    def steady(self) -> None:
        np.add(self._positions, 1, out=self._positions)
        self._runtime.step(self._batches[0], self._positions, self._ones, self._prompts, **self._on_device)

    def changed(self) -> None:
        self._batches.reverse()
        np.add(self._positions, 1, out=self._positions)
        self._runtime.step(self._batches[0], self._positions, self._ones, self._prompts, **self._on_device)


def steering(number: int, gates: int, slots: int, runs: int) -> ResolvedSteering:
    """What one request asks for: a vector at a scale of its own, then gated vectors, then clamps; in every other one of
    its answer's runs, where it has some."""
    asked: list[dict[str, Any]] = [
        {"kind": "add", "vector": direction(number % 8, 14, 15, 16), "scale": 1 + number / 9}
    ]
    for gate in range(gates):
        probe = Probe(direction(100 + gate, 8), 0.0)
        asked.append({"kind": "add", "vector": direction(200 + gate, 20), "gate": {"probe": probe, "threshold": 0.1}})
    for slot in range(slots):
        asked.append({"kind": "clamp", "vector": direction(300 + slot, *range(len(SITES))), "max": 1.0 + number})
    sites = frozenset(SITES)
    served = ModelSites(HIDDEN, len(SITES), sites, gates=GateLimits(gates, sites),
                        slots=SlotLimits(slots, sites, frozenset({"clamp"})))  # fmt: skip
    whole = Steering.parse({"interventions": asked}).resolve({}, served)
    if not runs:
        return whole
    starts = (0, *range(PROMPT, PROMPT + 100 * runs, 100))
    kinds = (0, *(1 + run % 2 for run in range(runs)))
    phases = (Phase.PREFILL, Phase.DECODE, Phase.DECODE)
    spans = Spans(PROMPT, starts, kinds, ((0,), (1,), (2,)), phases)
    return ResolvedSteering((EMPTY, whole.decode, EMPTY), spans=spans)


def operations(step: Callable[[], None], steps: int = 64) -> float:
    """Device operations per step."""
    with Views() as seen:
        for _ in range(steps):
            step()
    return seen.count / steps


def measured(requests: int, starts: int) -> dict[str, dict[str, Any]]:
    """For each kind of step, by case: of all starts the median, the least and the most."""
    times: dict[str, list[float]] = {}
    counts: dict[str, float] = {}
    for _ in range(starts):
        steps = {
            f"{kind}: {case}": getattr(batch, kind)
            for case, batch in ((case, Batch(requests, *asked)) for case, asked in CASES.items())
            for kind in ("steady", "changed")
        }
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(8):
            for name, step in steps.items():
                found[name].append(best(step, calls=64, repeats=4))
        for name, some in found.items():
            times.setdefault(name, []).append(min(some))
        counts = {name: operations(step) for name, step in steps.items()}
    return {
        name: {
            "microseconds": statistics.median(some),
            "least": min(some),
            "most": max(some),
            "operations": counts[name],
        }
        for name, some in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runtime_module.route = lambda args, count: None
    results = {requests: measured(requests, options.starts) for requests in BATCHES}
    table = Table("step", title="a step of decoding: microseconds of host time (device operations)")
    for requests in BATCHES:
        table.add_column(f"batch {requests}", justify="right")
    for name in results[BATCHES[0]]:
        row = [results[requests][name] for requests in BATCHES]
        table.add_row(name, *(f"{one['microseconds']:.1f} ({one['operations']:.2g})" for one in row))
    Console().print(table)
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        options.json.write_text(json.dumps({"machine": machine, "batches": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
