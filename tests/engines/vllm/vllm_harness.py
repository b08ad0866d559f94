"""Runs a scenario: a script that drives stock vLLM, in a process of its own, and reports what it saw as JSON.

vLLM's CPU worker changes torch for its whole process, and model runner V2 needs an environment that is set before
Python starts. A scenario checks many things with one start of the engine; tests then look at one of them each.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = Path(__file__).parent / "scenarios"

CASES = {  # runner, mode
    "V1 eager": ("v1", "eager"),
    "V1 compiled": ("v1", "compiled"),
    "V2 eager": ("v2", "eager"),
    "V2 compiled": ("v2", "compiled"),
}


def run_scenario(script: str, *arguments: str, runner: str = "v1", cache: Path | None = None) -> dict[str, Any]:
    """What `scenarios/<script>.py` reported, run with `arguments` on the model runner "v1" or "v2".

    `cache` is where vLLM keeps its compile artifacts; by default the folder of this run of the tests, so that vLLM
    looks into each model's class once.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-vllm-") as scratch:
        report = Path(scratch) / "report.json"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
            "VLLM_CACHE_ROOT": str(cache or os.environ["VLLM_CACHE_ROOT"]),
            "TRIMTAB_TEST_REPORT": str(report),
            "TRIMTAB_TEST_SCRATCH": scratch,
        }
        if runner == "v2":
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, str(SCENARIOS / f"{script}.py"), *arguments],
            env=environment, cwd=scratch, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0 or not report.exists():
            raise AssertionError(f"{script} {arguments} ended with {done.returncode}:\n{_tail(done)}")
        outcome: dict[str, Any] = json.loads(report.read_text())
        outcome["log"] = done.stdout + done.stderr
        return outcome


def outcomes_of(script: str, requests: Mapping[str, int]) -> Any:
    """A module's fixture: what a scenario reported in each of `CASES`, run once each with its number of `requests`.

    Fewer on V2, whose interpreted kernels take 0.1 s a step and more with each request.
    """

    @pytest.fixture(scope="module", params=CASES)
    def outcome(request: pytest.FixtureRequest) -> dict[str, Any]:
        runner, mode = CASES[request.param]
        number = requests[request.param]
        return {
            **run_scenario(script, mode, str(number), runner=runner),
            "case": request.param,
            "requests": number,
        }

    return outcome


def _tail(done: "subprocess.CompletedProcess[str]") -> str:
    return (done.stdout[-3000:] + done.stderr[-6000:]).strip()
