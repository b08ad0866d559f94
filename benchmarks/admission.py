"""Host microseconds that steering adds to the admission of a request in vLLM, by stage.

    python benchmarks/admission.py --json benchmarks/results/admission.json

One engine in one process, with dummy weights: 32 layers of width 4096, and next to nothing else in them, so that the
steps between the measurements are short. It serves steering at every layer, and a probe. Stages:

- "front end": `LLMEngine.add_request` up to the engine core: the spec is read, checked and put into its wire form;
- "sent": the request through vLLM's own msgpack encoder and decoder, as between the processes of a server;
- "engine core": what the core does when a request arrives;
- "worker": joining the runtime, in the step that runs the request first;
- "rows": composing new table rows in that step and starting their upload.

"one process" hands the request over as it is, as an engine without multiprocessing does. "two processes" sends it, so
that the core has nothing but the bytes. Numbers are medians over requests, the cases taking turns, less the medians of
unsteered requests. A new inline vector comes as float16 in base64, all layers, other numbers in each request.
"""

import argparse
import base64
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vllm_engine import LLAMA_8B

HIDDEN, LAYERS = LLAMA_8B["hidden_size"], LLAMA_8B["num_hidden_layers"]
NARROW = LLAMA_8B | {
    "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512,
    "max_position_embeddings": 512,
}  # fmt: skip
STAGES = ("front end", "sent", "engine core", "worker", "rows")
MODES = ("one process", "two processes")
UNSTEERED, INLINE = "unsteered", "new inline"
NAMES = 4
BATCH = 8  # requests of one case before it is another's turn


def cases() -> dict[str, Callable[[], dict[str, Any] | None]]:
    """What makes the `extra_args` of one request, by name; each call makes new objects, as a JSON reader does."""
    count = itertools.count(1)
    block = np.random.default_rng(0).standard_normal((LAYERS, HIDDEN)).astype(np.float16)

    def steering(**step: Any) -> dict[str, Any]:
        return {"steering": {"interventions": [{"kind": "add", **step}]}}

    def inline() -> dict[str, Any]:
        block.view(np.uint16)[:, 0] = next(count)
        body = {"dtype": "float16", "shape": [LAYERS, HIDDEN], "layer_indices": list(range(LAYERS))}
        return steering(vector={"post_block": body | {"data": base64.b64encode(block.tobytes()).decode()}})

    return {
        UNSTEERED: lambda: None,
        "named": lambda: steering(vector="v0", scale=1.5),
        "named, new scale": lambda: steering(vector=f"v{next(count) % NAMES}", scale=1.0 + next(count) / 8192),
        "gated": lambda: steering(vector="v0", scale=1.5, gate={"probe": "p0", "threshold": 1.0, "sharpness": 2.0}),
        INLINE: inline,
    }


def start(folder: Path) -> Any:
    """The engine, in this process."""
    from trimtab import Probe, SteeringVector
    from trimtab.sites import HookPoint, Site

    rng = np.random.default_rng(1)
    vectors = {f"v{i}": str(folder / f"v{i}.safetensors") for i in range(NAMES)}
    for path in vectors.values():
        rows = rng.standard_normal((LAYERS, HIDDEN)).astype(np.float32)
        SteeringVector({Site(layer, HookPoint.POST_BLOCK): row for layer, row in enumerate(rows)}).save(path)
    probe = folder / "p0.safetensors"
    Probe.at(Site(0, HookPoint.POST_BLOCK), rng.standard_normal(HIDDEN)).save(probe)
    (folder / "config.json").write_text(json.dumps(NARROW))

    from vllm import LLM

    llm = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        kv_cache_memory_bytes=64 << 20, gpu_memory_utilization=0.05, max_model_len=128, max_num_batched_tokens=128,
        max_num_seqs=2 * BATCH, additional_config={"steering": {"vectors": vectors, "probes": {"p0": str(probe)}}},
    )  # fmt: skip
    return llm.llm_engine


class Clock:
    """Seconds spent in functions that were replaced by timed ones, by stage, since the last `take`."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] += time.perf_counter() - began

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.on(stage):
                return original(*args, **kwargs)

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        spent, self._spent = self._spent, dict.fromkeys(STAGES, 0.0)
        return spent


class Bench:
    """The engine, with a clock at each stage."""

    def __init__(self, engine: Any) -> None:
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        from trimtab.engines.vllm.worker.membership import Membership
        from trimtab.runtime.upload import RowUploader

        self._engine, self._clock, self._ids = engine, Clock(), itertools.count()
        self._two_processes = False
        self._clock.wrap(Membership, "join", "worker")
        self._clock.wrap(RowUploader, "write", "rows")
        self._clock.wrap(engine.engine_core, "add_request", "engine core")
        encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreRequest)
        admit = engine.engine_core.add_request

        def add_request(request: Any) -> None:
            if self._two_processes:
                with self._clock.on("sent"):
                    request = decoder.decode([bytes(frame) for frame in encoder.encode(request)])
            admit(request)

        engine.engine_core.add_request = add_request

    def run(self, mode: str, make: Callable[[], dict[str, Any] | None]) -> list[dict[str, float]]:
        """Microseconds by stage of each of `BATCH` requests, which share what their first step takes."""
        from vllm import SamplingParams

        self._two_processes = mode == MODES[1]
        taken = []
        for _ in range(BATCH):
            params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=make())
            name, prompt = f"r{next(self._ids)}", {"prompt_token_ids": [5, 6]}
            self._clock.take()
            began = time.perf_counter()
            self._engine.add_request(name, prompt, params)
            whole = time.perf_counter() - began
            spent = self._clock.take()
            taken.append(spent | {"front end": whole - spent["sent"] - spent["engine core"]})
        while self._engine.has_unfinished_requests():
            self._engine.step()
        first = self._clock.take()
        for spent in taken:
            spent |= {stage: first[stage] / BATCH for stage in ("worker", "rows")}
        return [{stage: 1e6 * spent[stage] for stage in STAGES} for spent in taken]


def measure(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """One record per mode and case: the medians of unsteered requests, and what the others add to them."""
    kinds = cases()
    samples: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in itertools.product(MODES, kinds)}
    for round_number in range(-2, rounds):  # two rounds warm up
        for mode, name in samples:
            taken = bench.run(mode, kinds[name])
            if round_number >= 0:
                samples[mode, name].extend(taken)
    records = []
    for (mode, name), taken in samples.items():
        columns: dict[str, list[float]] = {stage: [spent[stage] for spent in taken] for stage in STAGES}
        columns["total"] = [sum(spent.values()) for spent in taken]
        medians = {column: statistics.median(values) for column, values in columns.items()}
        if name == UNSTEERED:
            base = medians
        shown = medians if name == UNSTEERED else {column: medians[column] - base[column] for column in medians}
        records.append({"mode": mode, "case": name, "requests": len(taken)} | shown)
    return records


def show(records: list[dict[str, Any]]) -> None:
    columns = (*STAGES, "total")
    print(f"{'':<14}{'':<18}" + "".join(f"{column:>13}" for column in columns))
    for r in records:
        sign = "" if r["case"] == UNSTEERED else "+"
        print(f"{r['mode']:<14}{r['case']:<18}" + "".join(f"{r[column]:>{sign}13.1f}" for column in columns))


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch
    import vllm

    named = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
    return {
        "processor": named[0] if named else platform.processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
        "vllm": vllm.__version__,
    }  # fmt: skip


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--rounds", type=int, default=12, help=f"turns of each case, {BATCH} requests each")
    options = parser.parse_args()
    # Before vLLM is imported. Only in one process can each stage be timed.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(start(Path(folder)))
        records = measure(bench, options.rounds)
    result = {"machine": machine(), "command": " ".join(Path(word).name for word in sys.argv), "records": records}
    print(result["machine"])
    show(records)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
