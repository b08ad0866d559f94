"""Microseconds per steering call on a GPU, against a device copy and a straightforward kernel; and the traced form.

    PYTHONPATH=src python3 benchmarks/ops.py --json benchmarks/results/ops.json
    PYTHONPATH=src python3 benchmarks/ops.py --tune --json tune.json     # times choices of launch sizes instead

Choices are named "w8 r64": warps, and bound on registers per thread.

Every number is taken inside a CUDA graph of 32 calls, divided by 32. Two memory conditions: "spread" over 32 distinct
sites (hidden states, tables, probes and outputs of their own, so little stays in a cache), and "resident", 2 sites in
turns, all of which the second-level cache holds. Three routings: "random" over 64 rows; in decode batches "distinct", a
row for each token; in prefill batches "runs", requests of 16 to 512 tokens, each on one row.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baseline_kernel import baseline_apply_steering
from gpu_timing import captured, machine, microseconds
from trimtab.ops import (
    ROWS_ONLY,
    Emission,
    MonitorOpArgs,
    SteeringBuffers,
    SteeringOpArgs,
    emit,
    monitor_op_args,
    set_emission,
    steering_op_args,
)
from trimtab.ops.kernels.apply_steering import launch_apply_steering
from trimtab.ops.kernels.launch import Launch, resident
from trimtab.sites import HookPoint, Site

CALLS, RESIDENT_SITES = 32, 2
RANDOM_ROWS = 65
DECODE = 256  # batches up to this size decode, one row per token; larger ones hold prompts
WIDTHS, TOKENS, RESIDENT_TOKENS = (2048, 4096, 8192), (1, 16, 64, 256, 2048, 8192), (1, 64, 256)
POST = HookPoint.POST_BLOCK
DTYPE = torch.bfloat16
apply, apply_in_place = torch.ops.trimtab.apply_steering, torch.ops.trimtab.apply_steering_
PLAIN_SCENARIOS = ("idle", "rows", "rows, random", "sparse", "monitor")
ROW_MONITOR_SCENARIOS = ("rows, row monitor off", "row monitor", "row monitor, random")


class Bench:
    """Sites of one width, and the contents of each scenario."""

    def __init__(self, width: int, tokens: int, *, row_monitor: bool, sites: int = CALLS) -> None:
        self.buffers = SteeringBuffers(
            [Site(layer, POST) for layer in range(sites)], hidden_size=width, max_tokens=tokens,
            max_rows=DECODE + 1 if tokens <= DECODE else RANDOM_ROWS, dtype=DTYPE, device="cuda",
            row_monitor=row_monitor,
        )  # fmt: skip
        self.hidden = torch.randn(sites, tokens, width, device="cuda", dtype=DTYPE)
        self.out = torch.empty_like(self.hidden)
        self.args: list[SteeringOpArgs] = []
        self.monitor_args: list[MonitorOpArgs] = []
        for number, site in enumerate(self.buffers.sites):
            module = nn.Module()
            self.buffers.attach(module, site)
            self.args.append(steering_op_args(module, POST, self.hidden[number]))
            self.monitor_args.append(monitor_op_args(module, POST, self.hidden[number]))
        self.tokens, self.sites = tokens, sites

    @property
    def routing(self) -> str:
        """How tokens are routed where the scenario does not say "random"."""
        return "distinct" if self.tokens <= DECODE else "runs"

    def set(self, scenario: str) -> None:
        """Fill the buffers: small rows, so that repeated in-place calls do not run away."""
        b = self.buffers
        b.any_active.fill_(scenario != "idle")
        b.table[:, 1:].normal_(std=1e-3)
        b.index.copy_(self._rows("random" if scenario == "sparse" or "random" in scenario else self.routing))
        if scenario == "sparse":  # one token in eight is steered
            b.index[torch.arange(self.tokens, device="cuda") % 8 != 0] = 0
        b.row_gate.fill_(1.0)
        b.decode_mask.fill_(1.0)
        b.token_scales.fill_(0.5 if scenario == "monitor" else 0.0)
        b.dynamic_vec.normal_(std=1e-3)
        b.monitor_active.fill_(scenario == "monitor")
        b.monitor_probe.normal_(std=1e-2)
        b.monitor_params[:] = torch.tensor([0.0, 1.0, 1.0], device="cuda")
        gated = scenario.startswith("row monitor")
        b.row_monitor_active.fill_(gated)
        if gated:
            b.row_probes[:, 1:].normal_(std=1e-2)
            b.row_params[..., 0] = 0.0

    def _rows(self, routing: str) -> Tensor:
        if routing == "random":
            return torch.randint(1, RANDOM_ROWS, (self.tokens,))
        if routing == "distinct":
            return 1 + torch.randperm(DECODE)[: self.tokens]
        lengths = torch.randint(16, 513, (self.tokens // 16,))
        return torch.randint(1, RANDOM_ROWS, lengths.shape).repeat_interleave(lengths)[: self.tokens]

    def verify(self) -> None:
        """The baseline must compute what we compute, or it is no baseline."""
        baseline_apply_steering(self.args[0], self.out[0])
        torch.testing.assert_close(apply(*self.args[0]), self.out[0], rtol=2**-6, atol=1e-5)

    def each(self, call: Callable[[int], object]) -> torch.cuda.CUDAGraph:
        """A graph of calls, site after site. Of what they return each site's last is held, so it has its own memory."""
        held: dict[int, object] = {}

        def calls() -> None:
            held.clear()
            for number in range(CALLS):
                held[number % self.sites] = call(number % self.sites)

        return captured(calls)


def operator_rows(widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """One record per width, number of tokens, scenario and memory condition."""
    conditions = [("spread", TOKENS, CALLS), ("resident", RESIDENT_TOKENS, RESIDENT_SITES)]
    records = []
    for memory, sizes, sites in conditions:
        for width, tokens, row_monitor in itertools.product(widths, sizes, (False, True)):
            bench = Bench(width, tokens, row_monitor=row_monitor, sites=sites)
            scenarios = ROW_MONITOR_SCENARIOS if row_monitor else PLAIN_SCENARIOS
            for scenario in scenarios:
                bench.set(scenario)
                bench.verify()
            graphs = {
                "copy": bench.each(lambda s, b=bench: b.out[s].copy_(b.hidden[s])),
                "baseline": bench.each(lambda s, b=bench: baseline_apply_steering(b.args[s], b.out[s])),
                "out of place": bench.each(lambda s, b=bench: apply(*b.args[s])),
                "in place": bench.each(lambda s, b=bench: apply_in_place(*b.args[s])),
            }
            for scenario in scenarios:
                bench.set(scenario)
                record = {"H": width, "N": tokens, "memory": memory, "scenario": scenario, "routing": bench.routing}
                if scenario == "sparse" or "random" in scenario:
                    record["routing"] = "random"
                records.append(record | microseconds(graphs, CALLS, rounds=5))
            if not row_monitor and memory == "spread":
                records.extend(_monitor_rows(bench, width))
            del graphs, bench
            torch.cuda.empty_cache()
    return records


def _monitor_rows(bench: Bench, width: int) -> list[dict[str, Any]]:
    """The cross-layer monitor alone: idle, and active."""
    graph = {"steering_monitor": bench.each(lambda s: torch.ops.trimtab.steering_monitor(*bench.monitor_args[s]))}
    record = {"H": width, "N": bench.tokens, "memory": "spread", "routing": bench.routing}
    bench.set("rows")
    idle = microseconds(graph, CALLS)
    bench.set("monitor")
    bench.buffers.monitor_params[:, 0] = -1e30  # a gate of exactly 1: replays leave the factors as they are
    active = microseconds(graph, CALLS, rounds=3)
    return [record | {"scenario": "steering_monitor idle"} | idle, record | {"scenario": "steering_monitor"} | active]


ELEMENTS_AND_REGISTERS = ((32, 128), (32, 96), (16, 64), (16, 80), (8, 40))  # per thread
TUNING = [  # memory condition, sites, widths, tokens
    ("resident", RESIDENT_SITES, (4096,), (1, 64, 256)),
    ("spread", CALLS, (4096,), (64, 256, 2048, 8192)),
    ("resident", RESIDENT_SITES, (2048, 8192), (1, 256)),
    ("spread", CALLS, (2048, 8192), (2048, 8192)),
]


def choices(width: int, tokens: int, device: torch.device) -> dict[str, Launch]:
    """The launches to compare, by name."""
    found: dict[str, Launch] = {}
    for per_thread, registers in ELEMENTS_AND_REGISTERS:
        warps = width // (32 * per_thread)
        found[f"w{warps} r{registers}"] = resident(tokens, Launch(width, warps, registers, 1), device)
    return found


def compile_choice(width: int, row_monitor: bool, in_place: bool, sizes: Launch) -> None:
    """Leave a variant in Triton's cache on disk, by running it on two tokens."""
    bench = Bench(width, 2, row_monitor=row_monitor, sites=1)
    launch_apply_steering(bench.args[0], bench.args[0].hidden_states if in_place else bench.out[0], sizes)
    torch.cuda.synchronize()


def compile_choices() -> None:
    """All variants that `tuning_rows` runs, in several processes: one alone would mostly compile."""
    device = torch.device("cuda", 0)
    variants = [
        (width, row_monitor, in_place, sizes)
        for width, row_monitor, in_place in itertools.product(WIDTHS, (False, True), (False, True))
        for sizes in choices(width, 2, device).values()
    ]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(compile_choice, *variant) for variant in variants]
    for error in filter(None, (done.exception() for done in pending)):
        print(f"not compiled ahead of time: {error}", file=sys.stderr)


def tuning_rows() -> list[dict[str, Any]]:
    """One record per memory condition, width, number of tokens and scenario: the times of the copy and all choices."""
    records = []
    for memory, sites, widths, sizes in TUNING:
        for width, tokens, row_monitor in itertools.product(widths, sizes, (False, True)):
            bench = Bench(width, tokens, row_monitor=row_monitor, sites=sites)
            scenarios = ("row monitor",) if row_monitor else ("idle", "rows")
            graphs = {"copy": bench.each(lambda s, b=bench: b.out[s].copy_(b.hidden[s]))}
            for name, launch in choices(width, tokens, bench.hidden.device).items():
                for in_place in (True, False):
                    graphs[f"{'in' if in_place else 'out'} {name}"] = bench.each(
                        lambda s, b=bench, z=launch, i=in_place: launch_apply_steering(
                            b.args[s], b.args[s].hidden_states if i else b.out[s], z
                        )
                    )
            for scenario in scenarios:
                bench.set(scenario)
                timed = microseconds(graphs, CALLS, rounds=5 if tokens <= DECODE else 3, budget_ms=0.7)
                record = {"H": width, "N": tokens, "memory": memory, "scenario": scenario, "routing": bench.routing}
                records.append(record | {"choices": timed})
            del graphs, bench
            torch.cuda.empty_cache()
    return records


LAYERS = 8


class Stack(nn.Module):
    """What a decoder does around a site: matmul, residual add, RMSNorm; the residual is steered."""

    def __init__(self, width: int, mode: Emission | None, buffers: SteeringBuffers, in_place: bool = False) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(width, width, device="cuda", dtype=DTYPE) for _ in range(LAYERS))
        self.norm = nn.Parameter(torch.ones(width, device="cuda", dtype=DTYPE))
        self.sites = nn.ModuleList(nn.Module() for _ in range(LAYERS))
        self.in_place = in_place
        if mode is not None:
            for site, module in zip(buffers.sites, self.sites, strict=True):
                buffers.attach(module, site)
                set_emission(module, mode)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for weight, site in zip(self.weights, self.sites, strict=True):
            residual = emit(site, POST, residual + x @ weight, in_place=self.in_place)
            wide = residual.float()
            x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(DTYPE) * self.norm
        return x + residual


@torch.no_grad()
def traced_rows(width: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Microseconds per layer that steering adds to a compiled stack, for the traced form and for the operator."""
    sites = [Site(layer, POST) for layer in range(LAYERS)]

    def owner(row_monitor: bool) -> SteeringBuffers:
        buffers = SteeringBuffers(
            sites, hidden_size=width, max_rows=max(sizes) + 1, max_tokens=max(sizes), dtype=DTYPE, device="cuda",
            row_monitor=row_monitor,
        )  # fmt: skip
        buffers.any_active.fill_(True)
        buffers.table[:, 1:].normal_(std=1e-3)
        buffers.index.copy_(1 + torch.randperm(max(sizes)))  # a row for each token
        if row_monitor:
            buffers.row_monitor_active.fill_(True)
            buffers.row_probes[:, 1:].normal_(std=1e-2)
        return buffers

    plain, gated = owner(False), owner(True)
    rows_and_row_monitor = ROWS_ONLY._replace(row_monitor=True)
    stacks = {
        "unsteered": Stack(width, None, plain),
        "traced rows": Stack(width, Emission(traced=True, terms=ROWS_ONLY), plain),
        "traced row monitor": Stack(width, Emission(traced=True, terms=rows_and_row_monitor), gated),
        "operator rows": Stack(width, Emission(), plain),
        "operator in place, rows": Stack(width, Emission(), plain, in_place=True),
        "operator row monitor": Stack(width, Emission(), gated),
    }
    for weights in zip(*(stack.weights for stack in stacks.values()), strict=True):
        weights[0].normal_(std=width**-0.5)
        for weight in weights[1:]:
            weight.data = weights[0].data
    compiled = {}
    for name, stack in stacks.items():
        torch._dynamo.reset()
        compiled[name] = torch.compile(stack, fullgraph=True, dynamic=True)
        compiled[name](torch.randn(max(sizes), width, device="cuda", dtype=DTYPE))
    records = []
    for tokens in sizes:
        x = torch.randn(tokens, width, device="cuda", dtype=DTYPE)
        graphs = {name: captured(lambda f=f, x=x: f(x)) for name, f in compiled.items()}
        records.append({"H": width, "N": tokens} | microseconds(graphs, LAYERS, rounds=25, budget_ms=2.0))
    return records


def print_operators(records: list[dict[str, Any]]) -> None:
    heads = f"{'copy':>8}{'baseline':>10}{'out of pl.':>11}{'in place':>10}  in/copy"
    print(f"{'memory':>9} {'H':>5} {'N':>5} {'scenario':<24}{heads}")
    for r in records:
        start = f"{r['memory']:>9} {r['H']:>5} {r['N']:>5} {r['scenario']:<24}"
        if "copy" in r:
            ratio = r["in place"] / r["copy"]
            print(f"{start}{r['copy']:>8.2f}{r['baseline']:>10.2f}{r['out of place']:>11.2f}{r['in place']:>10.2f}"
                  f"{ratio:>9.2f}")  # fmt: skip
        else:
            print(f"{start}{'':>29}{r['steering_monitor']:>10.2f}")


def print_traced(records: list[dict[str, Any]]) -> None:
    for r in records:
        base = r["unsteered"]
        added = ", ".join(f"{k} {v - base:+.2f}" for k, v in r.items() if k not in ("H", "N", "unsteered"))
        print(f"per layer at H={r['H']} N={r['N']}: unsteered {base:.2f} us; added: {added}")


def print_tuning(records: list[dict[str, Any]]) -> None:
    """Of each record the choices in order; then how far each is from the best over all."""
    behind: dict[tuple[Any, ...], list[float]] = {}
    for r in records:
        copy = r["choices"]["copy"]
        for form in ("in", "out"):
            times = {n.removeprefix(form + " "): t for n, t in r["choices"].items() if n.startswith(form + " ")}
            ranked = sorted(times, key=times.__getitem__)
            shown = "  ".join(f"{name}={times[name]:.2f}" for name in ranked)
            print(f"{r['memory']:>9} H={r['H']} N={r['N']} {r['scenario']} [{form}] copy={copy:.2f}: {shown}")
            if r["scenario"] == "idle" and form == "out":
                continue
            size = "small" if r["N"] <= DECODE else "large"
            for name, taken in times.items():
                behind.setdefault((r["H"], size, r["scenario"], form, name), []).append(taken / times[ranked[0]])
    for group in dict.fromkeys(key[:4] for key in behind):
        rates = {key[4]: rate for key, rate in behind.items() if key[:4] == group}
        means = {name: statistics.geometric_mean(rate) for name, rate in rates.items()}
        shown = "  ".join(f"{name} {means[name]:.3f}" for name in sorted(means, key=means.__getitem__))
        print(f"H={group[0]} {group[1]} {group[2]} [{group[3]}], time over the best's, mean: {shown}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--tune", action="store_true", help="time choices of launch sizes instead")
    parser.add_argument("--quick", action="store_true", help="H = 4096 alone")
    parser.add_argument("--no-traced", action="store_true", help="leave the compiled stacks out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine(), "command": " ".join(Path(word).name for word in sys.argv)}
    print(result["machine"])
    if options.tune:
        started = time.perf_counter()
        compile_choices()
        print(f"compiled in {time.perf_counter() - started:.0f} s")
        result["tuning"] = tuning_rows()
        print_tuning(result["tuning"])
    else:
        result["operators"] = operator_rows(WIDTHS[1:2] if options.quick else WIDTHS)
        print_operators(result["operators"])
    if not options.tune and not options.no_traced:
        result["traced"] = traced_rows(4096, (64, 256))
        print_traced(result["traced"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
