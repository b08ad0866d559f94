"""One vLLM engine under measurement, in a process of its own, driven over a pipe.

The engine has dummy weights of a real model's shape: speed does not depend on their values. `EngineProcess` starts it
and answers one case at a time, so that a driver can interleave a stock and a steered engine on one GPU with only one of
them busy at any moment.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN2_1B5 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN2_0B5 = QWEN2_1B5 | {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
}  # fmt: skip
TINY = LLAMA_8B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 32,
    "num_key_value_heads": 1, "vocab_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": LLAMA_8B, "qwen2-1.5b": QWEN2_1B5, "qwen2-0.5b": QWEN2_0B5, "tiny": TINY
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One workload: `requests` prompts of `prompt_tokens` tokens, each generating `new_tokens`.

    `steering` holds one spec per request, cycled; empty means unsteered.
    """

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    steering: tuple[Any, ...] = ()


@dataclass
class Measured:
    """What one run of a case gave; times in milliseconds.

    `step_ms` are the intervals between engine steps in which every request decoded. `gpu_ms` is the summed kernel time
    of such a step, or of the prefill where but one token is asked for (traced runs only). `admit_us` is the host time
    to add one request, `plan_us` that of planning a step.
    """

    total_s: float
    first_step_ms: float
    step_ms: list[float]
    admit_us: float
    gpu_ms: float | None = None
    kernels: dict[str, list[float]] = field(default_factory=dict)  # name -> launches and microseconds, per step
    plan_us: float | None = None
    status: dict[str, Any] = field(default_factory=dict)


class EngineProcess:
    """Handle of an engine in its own process; `run` and `close` block until it has answered.

    Raises RuntimeError as soon as an engine that is waited for fails or dies. No engine outlives the driver.
    """

    def __init__(
        self, name: str, shape: str, folder: Path, engine_args: dict[str, Any], environment: dict[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, shape, str(folder), engine_args, environment)
        self._process = context.Process(target=_serve, args=arguments, name=name)
        self._process.start()
        theirs.close()  # while anyone else held it, the death of the engine would not be seen
        atexit.register(self.kill)  # goes before the wait of `multiprocessing` for its children

    def wait_ready(self) -> float:
        """Seconds that the start took."""
        return float(self._receive())

    def run(self, case: Case, *, trace: bool = False) -> Measured:
        self._pipe.send((case, trace))
        measured = self._receive()
        assert isinstance(measured, Measured)
        return measured

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(60)
        self.kill()
        atexit.unregister(self.kill)

    def kill(self) -> None:
        """End it at once, with all processes below it."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or not begun
            self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = "its process has died"
        if isinstance(answer, str):
            raise RuntimeError(f"engine {self.name!r} failed:\n{answer}")
        return answer


def _serve(pipe: Connection, shape: str, folder: str, engine_args: dict[str, Any], environment: dict[str, str]) -> None:
    os.setpgrp()  # vLLM's own processes join this group
    os.environ.update(environment)  # before vLLM is imported
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    try:
        started = time.perf_counter()
        engine = _Engine(shape, Path(folder), engine_args)
        pipe.send(time.perf_counter() - started)
        while (request := pipe.recv()) is not None:
            pipe.send(engine.run(*request))
    except EOFError:  # the driver has ended
        pass
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        sys.stderr.flush()
        os.killpg(0, signal.SIGKILL)  # at its end it would wait for vLLM's processes, and those for it


class _Engine:
    def __init__(self, shape: str, folder: Path, engine_args: dict[str, Any]) -> None:
        from vllm import LLM

        model = folder / shape
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(SHAPES[shape]))
        self._vocab = int(SHAPES[shape]["vocab_size"])
        self._steered = "additional_config" in engine_args
        self._llm = LLM(model=str(model), load_format="dummy", skip_tokenizer_init=True, **engine_args)
        self._next_id = 0

    def run(self, case: Case, trace: bool) -> Measured:
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        rng = np.random.default_rng(self._next_id)
        requests = []
        for i in range(case.requests):
            extra = {"steering": case.steering[i % len(case.steering)]} if case.steering else None
            params = SamplingParams(
                max_tokens=case.new_tokens, ignore_eos=True, temperature=0.0, detokenize=False, extra_args=extra
            )
            prompt = {"prompt_token_ids": rng.integers(10, self._vocab - 10, case.prompt_tokens).tolist()}
            requests.append((f"{case.name}-{self._next_id}", prompt, params))
            self._next_id += 1

        prefill = trace and case.new_tokens == 1
        if prefill:
            self._llm.collective_rpc(start_trace)
        start = time.perf_counter()
        for request in requests:
            engine.add_request(*request)
        admitted = time.perf_counter()
        stamps = [admitted]
        first_token_at: float | None = None
        full_from: int | None = None
        traced_from = 0
        seen: set[str] = set()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if not outputs:
                continue
            stamps.append(time.perf_counter())
            seen.update(output.request_id for output in outputs)
            if first_token_at is None:
                first_token_at = stamps[-1]
            if full_from is None and len(seen) == case.requests:
                full_from = len(stamps) + 4  # the pipeline has settled by then
            if trace and not prefill and full_from is not None and len(stamps) == full_from:
                self._llm.collective_rpc(start_trace)
                traced_from = len(stamps)
            if trace and traced_from and len(stamps) == traced_from + 16:
                gpu = self._llm.collective_rpc(stop_trace)[0]
                trace = False
        total = time.perf_counter() - start
        if prefill:
            gpu = self._llm.collective_rpc(stop_trace, args=(1,))[0]
        steps = np.diff(np.asarray(stamps[full_from:-2] if full_from else [])) * 1e3
        measured = Measured(
            total_s=total,
            first_step_ms=((first_token_at or admitted) - admitted) * 1e3,
            step_ms=steps.tolist(),
            admit_us=(admitted - start) / case.requests * 1e6,
        )
        if traced_from or prefill:
            measured.gpu_ms, measured.kernels = gpu
        if self._steered:
            measured.status = self._llm.collective_rpc("trimtab_status")[0]
            measured.plan_us = self._llm.collective_rpc(plan_time)[0]
        return measured


def start_trace(worker: Any) -> None:
    """Begin to record the kernels of the steps that follow, in the worker's process."""
    import torch

    worker._benchmark_trace = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    worker._benchmark_trace.start()
    worker._benchmark_steps = 0
    if not hasattr(worker, "_benchmark_execute"):
        worker._benchmark_execute = worker.model_runner.execute_model

        def counted(*args: Any, **kwargs: Any) -> Any:
            worker._benchmark_steps += 1
            return worker._benchmark_execute(*args, **kwargs)

        worker.model_runner.execute_model = counted


def stop_trace(worker: Any, steps: int = 0) -> tuple[float, dict[str, list[float]]]:
    """(milliseconds of GPU work, kernels and copies by name), both per step, since `start_trace`.

    The steps are counted unless given.
    """
    import torch

    torch.cuda.synchronize()
    worker._benchmark_trace.stop()
    steps = steps or max(1, worker._benchmark_steps)
    kernels: dict[str, list[float]] = {}
    for event in worker._benchmark_trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = kernels.setdefault(event.name[:120], [0.0, 0.0])
            entry[0] += 1 / steps
            entry[1] += event.time_range.elapsed_us() / steps
    return sum(time for _, time in kernels.values()) / 1e3, kernels


def plan_time(worker: Any) -> float | None:
    """Median host microseconds of the runtime's step since the last call; the first call only installs the clock."""
    from trimtab.runtime import SteeringRuntime

    times: list[float] | None = getattr(worker, "_benchmark_plan_us", None)
    if times is None:
        times = worker._benchmark_plan_us = []
        original = SteeringRuntime.step

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                worker._benchmark_plan_us.append((time.perf_counter() - start) * 1e6)

        SteeringRuntime.step = timed  # type: ignore[method-assign]
    worker._benchmark_plan_us = []
    return statistics.median(times) if times else None


def as_json(measured: Measured) -> dict[str, Any]:
    """`measured` with its step times reduced to median and spread."""
    record = asdict(measured)
    steps = record.pop("step_ms")
    if steps:
        low, mid, high = np.percentile(steps, [10, 50, 90])
        record["step_ms"] = {"median": mid, "p10": low, "p90": high, "count": len(steps)}
    return record
