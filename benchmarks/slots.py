"""Microseconds per layer that slots add to a compiled stack, for each way to put them into it.

    PYTHONPATH=src python3 benchmarks/slots.py --json benchmarks/results/slots.json
    PYTHONPATH=src python3 benchmarks/slots.py --cpu          # small shapes, by the clock: only whether it runs

A layer is a matmul, a residual add, a site and an RMSNorm, and every token has a row that is added. "traced" is the
form inside the compiled graph, "opaque" the kernel behind it, in place. "unused": slots are declared and no row has
one. "used": each row has all K of them, a set that is mixed. Graphs captured with and without slots and chosen per step
cost "undeclared" where no token has a slot and "traced, used" where one has.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_timing import captured, machine, microseconds
from trimtab.ops import ROWS_ONLY, Emission, SlotForm, SteeringBuffers, emit, set_emission, slot_op_args
from trimtab.sites import HookPoint, Site

POST = HookPoint.POST_BLOCK
COUNTS = (1, 4)
DIRECTIONS = 64  # rows that slots read, of all that there are


class Stack(nn.Module):
    """Layers whose residual is steered by traced rows, and by slots in one of the ways."""

    def __init__(self, buffers: SteeringBuffers, weights: list[Tensor], *, opaque: bool) -> None:
        super().__init__()
        self.weights = weights
        self.norm = torch.ones_like(weights[0][0])
        self.sites = nn.ModuleList(nn.Module() for _ in weights)
        self.opaque = opaque
        slots = buffers.slots
        for module, site in zip(self.sites, buffers.sites, strict=True):
            buffers.slots = None if opaque else slots
            buffers.attach(module, site)
            set_emission(module, Emission(traced=True, terms=ROWS_ONLY))
            if opaque and slots is not None:
                module.slots = nn.Module()
                buffers.slots = slots
                buffers.attach(module.slots, site)
        buffers.slots = slots

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for weight, site in zip(self.weights, self.sites, strict=True):
            residual = emit(site, POST, residual + x @ weight)
            if self.opaque:
                torch.ops.trimtab.apply_slots_(*slot_op_args(site.slots, POST, residual, None))
            wide = residual.float()
            x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(residual.dtype) * self.norm
        return x + residual


def owner(shape: argparse.Namespace, count: int) -> SteeringBuffers:
    """Random small rows, one for each token, and directions behind them."""
    form = SlotForm(count, ("clip",), writes=False) if count else None
    most = max(shape.tokens)
    buffers = SteeringBuffers(
        [Site(layer, POST) for layer in range(shape.layers)], hidden_size=shape.width, max_tokens=most,
        max_rows=1 + most + DIRECTIONS, dtype=torch.bfloat16, device=shape.device, slots=form,
    )  # fmt: skip
    buffers.any_active.fill_(True)
    buffers.table[:, 1 : 1 + most].normal_(std=1e-3)
    buffers.table[:, 1 + most :].normal_(std=shape.width**-0.5)
    buffers.index.copy_(1 + torch.randperm(most))
    return buffers


def use(buffers: SteeringBuffers, used: bool) -> None:
    """Give every row its slots at every site, clamps of which most change something; or take them away."""
    slots = buffers.slots
    if slots is None:
        return
    slots.slab.zero_()
    if not used:
        return
    rows, count = buffers.table.shape[1] - DIRECTIONS, slots.form.count
    shape, device = (len(slots.sites), rows - 1, count), slots.slab.device
    slots.rows[:, 1:rows, :, 0] = torch.randint(rows, rows + DIRECTIONS, shape, device=device)
    numbers = torch.tensor([1.0, 0.0, 1.0, -0.5, 0.5], device=device)  # read factor, bias, strength, low, high
    slots.params[:, 1:rows, :, :5] = numbers
    slots.mix[:, 1:rows] = torch.eye(count, device=device) + 0.01


def verify(traced: Callable[[Tensor], Tensor], opaque: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Two ways that are compared compute the same, up to a rounding at each layer."""
    torch.testing.assert_close(traced(x), opaque(x), rtol=0.1, atol=0.1)


def by_the_clock(works: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """What `microseconds` tells, where there are no graphs and no events."""
    found = {}
    for name, work in works.items():
        work()
        samples = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            samples.append(1e6 * (time.perf_counter() - started) / calls)
        found[name] = statistics.median(samples)
    return found


@torch.no_grad()
def measure(shape: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each number of tokens: the microseconds per layer of each way."""
    deviation = shape.width**-0.5
    weights = [
        torch.empty(shape.width, shape.width, device=shape.device, dtype=torch.bfloat16).normal_(std=deviation)
        for _ in range(shape.layers)
    ]
    owners = {count: owner(shape, count) for count in (0, *COUNTS)}
    stacks = {"undeclared": (0, Stack(owners[0], weights, opaque=False))}
    for count in COUNTS:
        stacks[f"traced, {count}"] = (count, Stack(owners[count], weights, opaque=False))
        stacks[f"opaque, {count}"] = (count, Stack(owners[count], weights, opaque=True))
    torch._dynamo.config.recompile_limit = 64  # all stacks share one forward, compiled for N = 1 and for others
    compiled = {}
    for name, (_, stack) in stacks.items():
        compiled[name] = torch.compile(stack, fullgraph=True, dynamic=True)
        compiled[name](torch.randn(max(shape.tokens), shape.width, device=shape.device, dtype=torch.bfloat16))
    records = []
    for tokens in shape.tokens:
        x = torch.randn(tokens, shape.width, device=shape.device, dtype=torch.bfloat16)
        works = {name: lambda f=f, x=x: f(x) for name, f in compiled.items()}
        if not shape.cpu:
            graphs = {name: captured(work) for name, work in works.items()}
        record: dict[str, Any] = {"H": shape.width, "N": tokens, "layers": shape.layers}
        for used in (False, True):
            for buffers in owners.values():
                use(buffers, used)
            for count in COUNTS:
                verify(compiled[f"traced, {count}"], compiled[f"opaque, {count}"], x)
            if shape.cpu:
                timed = by_the_clock(works, shape.layers)
            else:
                timed = microseconds(graphs, shape.layers, rounds=25, budget_ms=2.0)
            record["used" if used else "unused"] = timed
        records.append(record)
    return records


def print_table(records: list[dict[str, Any]]) -> None:
    """What each way adds to a layer with rows and no slots declared, unused and used."""
    ways = [name for name in records[0]["used"] if name != "undeclared"]
    print("us per layer; of each way what it adds to undeclared, unused / used")
    print(f"{'N':>5} {'undeclared':>11}" + "".join(f"{way + ' slots':>20}" for way in ways))
    for record in records:
        cells = []
        for way in ways:
            added = [record[state][way] - record[state]["undeclared"] for state in ("unused", "used")]
            cells.append(f"{added[0]:+.2f} / {added[1]:+.2f}".rjust(20))
        print(f"{record['N']:>5} {record['unused']['undeclared']:>11.2f}" + "".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--cpu", action="store_true", help="small shapes on the CPU, by the clock")
    parser.add_argument("--width", type=int, help="H; 4096 by default, 64 with --cpu")
    parser.add_argument("--layers", type=int, help="16 by default, 2 with --cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="batch sizes; 1 32 256 by default, 1 8 with --cpu")
    shape = parser.parse_args()
    if not shape.cpu and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 1
    width, layers, tokens = (64, 2, [1, 8]) if shape.cpu else (4096, 16, [1, 32, 256])
    shape.width, shape.layers, shape.tokens = shape.width or width, shape.layers or layers, shape.tokens or tokens
    shape.device = "cpu" if shape.cpu else "cuda"
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": {"device": "cpu", "torch": torch.__version__} if shape.cpu else machine()}
    result["command"] = " ".join(Path(word).name for word in sys.argv)
    print(result["machine"])
    result["slots"] = measure(shape)
    print_table(result["slots"])
    if shape.json:
        shape.json.parent.mkdir(parents=True, exist_ok=True)
        shape.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
