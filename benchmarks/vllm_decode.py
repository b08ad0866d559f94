"""What steering costs in vLLM: stock and steered engines on one GPU, interleaved and repeated.

    python benchmarks/vllm_decode.py --engines steered second --output benchmarks/results/vllm_decode_h200.json
    python benchmarks/vllm_decode.py --engines steered slots1 slots4 --few --trace --output slots.json
    python benchmarks/vllm_decode.py --engines gates row_monitor --trace --output benchmarks/results/row_monitor.json
    python benchmarks/vllm_decode.py --engines steered gates v1 --few --output benchmarks/results/vllm_gates_h200.json

Per batch size, every repeat runs stock, then one other case, then stock again, and so on through the cases; a ratio is
taken against the two stock runs around it and the median over repeats is reported with its spread, so that drift of the
machine cancels. What remains of chance is shown by the case "stock, second engine": the same engine started twice.
GPU time is the sum of kernel times of traced steps, in separate runs. Which engine's weights were allocated first
matters too: compare runs with and without `--stock-last`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_engine import SHAPES, Case, EngineProcess, Measured, as_json

DISTINCT = (1, 8, 64, 256)
# Small enough to round away: with dummy weights, whose activations are tiny too, a vector that changes them makes all
# requests alike, and a chip that works on equal numbers draws less power and clocks higher.
STRENGTH = 1e-7
PROBES = 64
GATES = {"gates": 4, "gates2": 2}  # engine -> gates per token; 4 is the default
SLOTS = {"slots1": 1, "slots4": 4}  # engine -> slots per token and site, at every layer

Run = tuple["EngineProcess", Case]


def make_vectors(folder: Path, shape: str, count: int) -> dict[str, str]:
    """`count` random vectors at `post_block` of every layer, saved in the native format; name -> path."""
    from trimtab import SteeringVector
    from trimtab.sites import HookPoint, Site

    hidden, layers = SHAPES[shape]["hidden_size"], SHAPES[shape]["num_hidden_layers"]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for i in range(count):
        directions = {
            Site(layer, HookPoint.POST_BLOCK): STRENGTH * rng.standard_normal(hidden).astype(np.float32)
            for layer in range(layers)
        }
        path = folder / f"v{i}.safetensors"
        SteeringVector(directions).save(path)
        paths[f"v{i}"] = str(path)
    return paths


def make_probes(folder: Path, shape: str) -> dict[str, str]:
    """Random probes at `post_block` of `probe_layer`, saved in the native format; name -> path."""
    from trimtab.sites import HookPoint, Site
    from trimtab.vectors.probe import Probe

    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for i in range(PROBES):
        direction = rng.standard_normal(SHAPES[shape]["hidden_size"]).astype(np.float32)
        paths[f"p{i}"] = str(folder / f"p{i}.safetensors")
        Probe.at(Site(probe_layer(shape), HookPoint.POST_BLOCK), direction).save(paths[f"p{i}"])
    return paths


def probe_layer(shape: str) -> int:
    return min(12, int(SHAPES[shape]["num_hidden_layers"]) // 2)


def named(i: int, scale: float = 1.0) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": f"v{i}", "scale": scale}]}


def gated(i: int, gates: int, layers: range) -> dict[str, Any]:
    """Spec number `i`: `gates` vectors from the probes' layer on, each behind a gate of its own."""
    return {
        "interventions": [
            {
                "kind": "add",
                "vector": f"v{(i + 64 * gate) % max(DISTINCT)}",
                "layers": list(layers),
                "gate": {"probe": f"p{(i + gate) % PROBES}", "threshold": i / 1e3, "sharpness": 1.0 + gate},
            }
            for gate in range(gates)
        ]
    }


def steered_cases(batch: int, prompt: int, new: int, few: bool = False) -> list[Case]:
    """Idle, 1 to 256 distinct vectors (as far as the batch holds them), and one vector at distinct scales.

    `few` leaves out all but the first and the most vectors.
    """
    cases = [Case("idle", batch, prompt, new)]
    fitting = [count for count in DISTINCT if count <= batch]
    for count in fitting[-1:] if few else fitting:
        cases.append(Case(f"{count} vectors", batch, prompt, new, tuple(named(i) for i in range(count))))
    if batch > 1 and not few:
        cases.append(Case("scales", batch, prompt, new, tuple(named(0, 1 + i / batch) for i in range(batch))))
    return cases


def gated_cases(engine: str, batch: int, prompt: int, new: int, layers: range) -> list[Case]:
    """None, one and all gates per request, every request with specs of its own."""
    name = "gates" if engine == "gates" else f"{GATES[engine]} gates"
    cases = [Case(f"{name}, none used", batch, prompt, new)]
    for used in (1, GATES[engine]):
        specs = tuple(gated(i, used, layers) for i in range(batch))
        cases.append(Case(f"{name}, {used} used", batch, prompt, new, specs))
    return cases


def monitored_cases(engine: str, batch: int, prompt: int, new: int, layer: int) -> list[Case]:
    """No gate, and one per request at its probe's site alone: a probe of a row, where the engine has the setting."""
    name = engine.replace("_", " ")
    specs = tuple(gated(i, 1, range(layer, layer + 1)) for i in range(batch))
    used = Case(f"{name}, 1 used at its site", batch, prompt, new, specs)
    return [Case(f"{name}, none used", batch, prompt, new), used] if engine == "row_monitor" else [used]


def slotted(i: int, slots: int) -> dict[str, Any]:
    """Spec number `i`: `slots` directions of which next to nothing is taken out, at every layer."""
    return {
        "interventions": [
            {"kind": "ablate", "vector": f"v{(i + 64 * slot) % max(DISTINCT)}", "strength": STRENGTH}
            for slot in range(slots)
        ]
    }


def slotted_cases(engine: str, batch: int, prompt: int, new: int) -> list[Case]:
    """No slot and all slots used, every request with directions of its own."""
    name, slots = f"{SLOTS[engine]} slots", SLOTS[engine]
    specs = tuple(slotted(i, slots) for i in range(batch))
    return [Case(f"{name}, none used", batch, prompt, new), Case(f"{name}, all used", batch, prompt, new, specs)]


class Comparison:
    """Runs one workload on all engines, `repeats` times, and keeps every measurement."""

    def __init__(self, engines: dict[str, EngineProcess], arguments: argparse.Namespace) -> None:
        self.engines, self.repeats, self.trace, self.few = engines, arguments.repeats, arguments.trace, arguments.few
        self.layers = range(probe_layer(arguments.shape), SHAPES[arguments.shape]["num_hidden_layers"])
        self.records: list[dict[str, Any]] = []

    def decode(self, batch: int, prompt: int, new: int) -> None:
        base = Case("stock", batch, prompt, new)
        runs = self._runs(base, steered_cases(batch, prompt, new, self.few))
        for name in (name for name in GATES if name in self.engines):
            runs += [(self.engines[name], case) for case in gated_cases(name, batch, prompt, new, self.layers)]
        if "row_monitor" in self.engines:
            for name in (name for name in ("row_monitor", "gates") if name in self.engines):
                cases = monitored_cases(name, batch, prompt, new, self.layers[0])
                runs += [(self.engines[name], case) for case in cases]
        for name in (name for name in SLOTS if name in self.engines):
            runs += [(self.engines[name], case) for case in slotted_cases(name, batch, prompt, new)]
        if "monitor" in self.engines:
            cases = steered_cases(batch, prompt, new, few=True)
            runs += [(self.engines["monitor"], replace(case, name=f"monitor, {case.name}")) for case in cases]
        if "before" in self.engines:
            cases = steered_cases(batch, prompt, new, self.few)
            runs += [(self.engines["before"], replace(case, name=f"before, {case.name}")) for case in cases]
        self._interleave(f"decode {batch}", base, runs, _step, trace=self.trace)
        if "v1" in self.engines:
            runs = [(self.engines["v1"], case) for case in steered_cases(batch, prompt, new, self.few)]
            self._interleave(f"V1 decode {batch}", base, runs, _step, trace=self.trace, stock="v1 stock")

    def prefill(self, tokens: int) -> None:
        base = Case("stock", 1, tokens, 1)
        cases = [Case("idle", 1, tokens, 1), Case("1 vectors", 1, tokens, 1, (named(0),))]
        self._interleave(f"prefill {tokens}", base, self._runs(base, cases), _first_step, trace=self.trace)
        if "v1" in self.engines:
            runs = [(self.engines["v1"], case) for case in cases]
            self._interleave(f"V1 prefill {tokens}", base, runs, _first_step, trace=self.trace, stock="v1 stock")

    def throughput(self, requests: int, prompt: int, new: int) -> None:
        base = Case("stock", requests, prompt, new)
        runs = self._runs(base, steered_cases(requests, prompt, new, self.few))
        self._interleave(f"throughput {requests}", base, runs, lambda m: m.total_s * 1e3)

    def _runs(self, base: Case, cases: list[Case]) -> list[Run]:
        again = [(name, self.engines[name]) for name in ("second", "third") if name in self.engines]
        control = [(engine, replace(base, name=f"stock, {name} engine")) for name, engine in again]
        return [*control, *((self.engines["steered"], case) for case in cases if "steered" in self.engines)]

    def _interleave(
        self, workload: str, base: Case, runs: list[Run], value: Any, *, trace: bool = False, stock: str = "stock"
    ) -> None:
        if not runs:
            return
        reference = self.engines[stock]
        reference.run(base)
        for engine, case in runs:
            engine.run(case)
        ratios: dict[str, list[float]] = {case.name: [] for _, case in runs}
        values: dict[str, list[float]] = {name: [] for name in ("stock", *ratios)}
        last: dict[str, Measured] = {}
        for repeat in range(self.repeats):
            turn = repeat % len(runs)
            before = value(reference.run(base))
            values["stock"].append(before)
            for engine, case in runs[turn:] + runs[:turn]:
                last[case.name] = engine.run(case)
                values[case.name].append(value(last[case.name]))
                last["stock"] = reference.run(base)
                after = value(last["stock"])
                values["stock"].append(after)
                ratios[case.name].append(values[case.name][-1] / ((before + after) / 2))
                before = after
        gpu: dict[str, tuple[float | None, dict[str, list[float]]]] = {}
        if trace:
            traced = {case.name: engine.run(case, trace=True) for engine, case in [(reference, base), *runs]}
            gpu = {name: (m.gpu_ms, m.kernels) for name, m in traced.items()}
        for name in values:
            record = {
                "workload": workload, "case": name, "ms": statistics.median(values[name]), "all_ms": values[name],
                "ratio": statistics.median(ratios[name]) if name in ratios else 1.0, "all_ratios": ratios.get(name, []),
                "gpu_ms": gpu.get(name, (None, {}))[0], "gpu_kernels": gpu.get(name, (None, {}))[1],
                "last": as_json(last[name]),
            }  # fmt: skip
            self.records.append(record)
        self._print(workload)

    def _print(self, workload: str) -> None:
        rows = [r for r in self.records if r["workload"] == workload]
        stock_gpu = rows[0]["gpu_ms"]
        heads = ("ms", "overhead", "least", "most", "GPU ms", "GPU +", "plan us", "admit us")
        print(f"\n{workload:22}" + "".join(f"{head:>10}" for head in heads))
        for r in rows:
            ratios, gpu, last = r["all_ratios"] or [1.0], r["gpu_ms"], r["last"]
            cells = [
                f"{r['ms']:.3f}", f"{r['ratio'] - 1:+.2%}", f"{min(ratios) - 1:+.2%}", f"{max(ratios) - 1:+.2%}",
                f"{gpu:.3f}" if gpu else "", f"{gpu / stock_gpu - 1:+.2%}" if gpu and stock_gpu else "",
                f"{last['plan_us']:.1f}" if last["plan_us"] else "", f"{last['admit_us']:.1f}",
            ]  # fmt: skip
            print(f"{r['case']:22}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def _step(measured: Measured) -> float:
    return statistics.median(measured.step_ms)


def _first_step(measured: Measured) -> float:
    return measured.first_step_ms


def machine() -> dict[str, Any]:
    import torch
    import triton
    import vllm

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu, "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
        "vllm": vllm.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32, 128, 256])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=16384, help="prompt length of the prefill case; 0 for none")
    parser.add_argument("--throughput", action="store_true", help="256 requests of 96 + 128 tokens, whole run")
    parser.add_argument(
        "--engines", nargs="+", default=["steered"],
        choices=("steered", "second", "third", "gates", "gates2", "row_monitor", "slots1", "slots4", "monitor", "v1"),
        help="beside stock: steered; a second and a third stock one, to see what chance does; with gates, 4 or 2, "
        "or 4 and the row monitor, whose cases run with `gates` too; with slots, 1 or 4; "
        "behind a monitor; steered and stock on the V1 runner",
    )  # fmt: skip
    parser.add_argument("--few", action="store_true", help="only idle and the most distinct vectors")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture graphs")
    parser.add_argument("--stock-last", action="store_true", help="start stock after the others, not before")
    parser.add_argument("--pause", type=float, default=0, help="seconds between the starts, so that their order holds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trace", action="store_true", help="also measure GPU time per step")
    parser.add_argument("--before", default="", help="a folder with another trimtab: a steered engine of its code")
    parser.add_argument("--layers", default=None, help="steer only these layers, e.g. 8-24")
    parser.add_argument("--cache-gib", type=int, default=8, help="KV cache of each engine")
    parser.add_argument("--attention", default="FLASH_ATTN", help="attention backend; empty for vLLM's choice")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        vectors = make_vectors(Path(folder) / "vectors", arguments.shape, max(DISTINCT))
        common = {
            "max_num_seqs": max([*arguments.batches, 256 if arguments.throughput else 1]),
            "max_num_batched_tokens": max(8192, arguments.prefill), "max_model_len": max(4096, arguments.prefill + 64),
            # a fixed cache: two engines that start together must not size theirs from the memory they see free
            "kv_cache_memory_bytes": arguments.cache_gib << 30, "gpu_memory_utilization": 0.12,
            "enable_prefix_caching": False, "enforce_eager": arguments.eager,
        }  # fmt: skip
        if arguments.attention:
            common["attention_config"] = {"backend": arguments.attention}
        steering: dict[str, Any] = {"vectors": vectors, "hook_points": ["post_block"]}
        if arguments.layers:
            steering["layers"] = arguments.layers
        probed = steering | {"probes": make_probes(Path(folder) / "probes", arguments.shape)}
        v1, v2 = ({"VLLM_USE_V2_MODEL_RUNNER": value} for value in "01")
        configured: dict[str, tuple[dict[str, Any] | None, dict[str, str]]] = {"stock": (None, v2)}
        choices = {"steered": (steering, v2), "v1": (steering, v1)} | dict.fromkeys(("second", "third"), (None, v2))
        choices |= {name: (probed | {"gates": count}, v2) for name, count in GATES.items()}
        choices |= {name: (steering | {"slots": count, "kinds": ["ablate"]}, v2) for name, count in SLOTS.items()}
        choices["row_monitor"] = (probed | {"gates": GATES["gates"], "row_monitor": True}, v2)
        monitor = {"probe": probed["probes"]["p0"], "threshold": 0.0, "sharpness": 1.0}
        choices["monitor"] = (steering | {"monitor": monitor}, v2)
        configured |= {name: choices[name] for name in arguments.engines}
        if arguments.before:
            path = os.pathsep.join([arguments.before, *filter(None, [os.environ.get("PYTHONPATH")])])
            configured["before"] = (steering, v2 | {"PYTHONPATH": path})
        if "v1" in arguments.engines:
            configured["v1 stock"] = (None, v1)
        if arguments.stock_last:
            configured["stock"] = configured.pop("stock")
        engines = {}
        for name, (settings, environment) in configured.items():
            time.sleep(arguments.pause if engines else 0)
            extra = {} if settings is None else {"additional_config": {"steering": settings}}
            engines[name] = EngineProcess(name, arguments.shape, Path(folder), common | extra, environment)
        starts = {name: engine.wait_ready() for name, engine in engines.items()}
        print("seconds to start:", starts, flush=True)
        comparison = Comparison(engines, arguments)
        try:
            for batch in arguments.batches:
                comparison.decode(batch, arguments.prompt, arguments.new)
                save(arguments, starts, comparison, started)
            if arguments.prefill:
                comparison.prefill(arguments.prefill - 64)
                save(arguments, starts, comparison, started)
            if arguments.throughput:
                comparison.throughput(256, 96, 128)
        finally:
            save(arguments, starts, comparison, started)
            for engine in engines.values():
                engine.close()


def save(arguments: argparse.Namespace, starts: dict[str, float], comparison: Comparison, started: float) -> None:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    settings.pop("output")
    report = {
        "machine": machine(), "settings": settings, "start": starts, "seconds": time.perf_counter() - started,
        "records": comparison.records,
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
