"""Throughput while requests wait for table rows, against the same number of requests at a time without that limit.

All engines run `--concurrency` requests at a time, each with a vector of its own, while the others wait: in `pooled`
for rows, of which there are as many, in `free` for a place in the batch, with rows for all. `control` is made as `free`
is: what two equal engines differ by. Each run brings vectors that no engine has seen, the same ones to all engines, so
that all write as many rows: a table with room for them would else keep those of the run before.

Requests are handed over one after another while the engine runs, so they end one after another, not in waves.
Runs of the engines take turns; with several starts each starts anew. A ratio is the median over the turns of a start.

    python benchmarks/row_pool.py --shape llama-8b --starts 3 --output pool.json          # on a GPU
    VLLM_USE_V2_MODEL_RUNNER=0 python benchmarks/row_pool.py --cpu --shape tiny --output pool.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vllm_engine import SHAPES, Case, EngineProcess


def case_of(arguments: argparse.Namespace, run: int) -> Case:
    """Requests with a vector each, at one layer: what differs between requests is their rows alone."""
    rng, width = np.random.default_rng(run), SHAPES[arguments.shape]["hidden_size"]
    specs = tuple(
        {"interventions": [{"kind": "add", "vector": {"post_block": {"1": rng.normal(size=width).round(3).tolist()}}}]}
        for _ in range(arguments.requests)
    )
    return Case("pool", arguments.requests, arguments.prompt, arguments.new, specs)


def engine_options(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the engines are made with."""
    common: dict[str, Any] = {
        "max_model_len": arguments.prompt + arguments.new + 16,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 8192,
    }
    if arguments.cpu:
        common |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "block_size": 32}
    else:
        sizes = [1, 2, 4, *range(8, arguments.concurrency + 1, 8)]
        common |= {
            "kv_cache_memory_bytes": 8 << 30,
            "gpu_memory_utilization": 0.3,  # three engines side by side; vLLM asks for so much to be free at start
            "attention_config": {"backend": "FLASH_ATTN"},
            "compilation_config": {"cudagraph_capture_sizes": sizes},
        }
    rows = arguments.concurrency + 1
    pooled = {"max_num_seqs": arguments.requests, "additional_config": {"steering": {"max_rows": rows}}}
    free = {
        "max_num_seqs": arguments.concurrency,
        "additional_config": {"steering": {"max_rows": arguments.requests + 1}},
    }
    return {"pooled": common | pooled, "free": common | free, "control": common | free}


def one_start(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each run, by engine."""
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            name: EngineProcess(name, arguments.shape, Path(folder) / name, options, environment)
            for name, options in engine_options(arguments).items()
        }
        names, seconds = list(engines), {name: [] for name in engines}
        for engine in engines.values():
            engine.wait_ready()
            engine.run(case_of(arguments, 0))  # kernels, caches
        for turn in range(arguments.repeats):
            case = case_of(arguments, 1 + turn)
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                seconds[name].append(engines[name].run(case).total_s)
        for engine in engines.values():
            engine.close()
    return seconds


def against_free(seconds: dict[str, list[float]], name: str) -> float:
    """Throughput of an engine against that of `free`, in the same turn: the median over the turns."""
    return statistics.median(free / own for free, own in zip(seconds["free"], seconds[name], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="stock vLLM on a CPU, eagerly")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    tokens = arguments.requests * arguments.new
    starts = []
    for number in range(arguments.starts):
        seconds = one_start(arguments)
        rate = {name: tokens / statistics.median(runs) for name, runs in seconds.items()}
        ratios = {name: against_free(seconds, name) for name in ("pooled", "control")}
        starts.append({"seconds": seconds, "ratios": ratios})
        rates = ", ".join(f"{name} {number:.0f}" for name, number in rate.items())
        against = ", ".join(f"{name} {ratio:.4f}" for name, ratio in ratios.items())
        print(f"start {number}: {rates} tokens/s; against free: {against}", flush=True)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    import vllm

    report = {"settings": settings, "vllm": vllm.__version__, "host": platform.processor(), "starts": starts}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
