"""Runs a scenario: a script that drives stock vLLM, in a process of its own, and reports what it saw as JSON.

vLLM's CPU worker changes torch for its whole process, and model runner V2 needs an environment that is set before
Python starts: a scenario is forked from a process that has imported vLLM for that runner and done nothing else. A
scenario checks many things with one start of the engine; tests then look at one of them each.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

CASES = {  # runner, mode; "traced" is "compiled" up to the graphs that Inductor would be given, without its minute
    f"{runner} {mode}": (runner.lower(), mode) for runner in ("V1", "V2") for mode in ("eager", "traced", "compiled")
}


def run_scenario(script: str, *arguments: str, runner: str = "v1", cache: Path | None = None) -> dict[str, Any]:
    """What `scenarios/<script>.py` reported, run with `arguments` on the model runner "v1" or "v2".

    `cache` is where vLLM keeps its compile artifacts; by default the folder of this run of the tests, so that vLLM
    looks into each model's class once.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-vllm-") as scratch:
        report, log = Path(scratch) / "report.json", Path(scratch) / "log"
        environment = _environment(runner) | {
            "VLLM_CACHE_ROOT": str(cache or os.environ["VLLM_CACHE_ROOT"]),
            "TRIMTAB_TEST_REPORT": str(report),
            "TRIMTAB_TEST_SCRATCH": scratch,
        }
        code = _parent(runner).run(script, arguments, environment, scratch, log)
        text = log.read_text(errors="replace")
        if code != 0 or not report.exists():
            raise AssertionError(f"{script} {arguments} ended with {code}:\n{text[-9000:].strip()}")
        outcome: dict[str, Any] = json.loads(report.read_text())
        assert outcome.pop("vllm") == version("vllm")
        return {**outcome, "log": text}


def _environment(runner: str) -> dict[str, str]:
    """What a process that runs scenarios finds in its environment, from its start on."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # take the processor's word for its vectors: a trial takes 15 s of CPU
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",  # a busy machine is no fault
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
    }
    if runner == "v2":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


class _Parent:
    """The process that scenarios of one model runner are forked from (see warm_parent.py)."""

    def __init__(self, runner: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # it goes with this object
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "warm_parent.py")], env=_environment(runner),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, script: str, arguments: Sequence[str], environment: dict[str, str], folder: str, log: Path) -> int:
        """The exit code of a scenario; 0 alone means that it came to its end."""
        job = {
            "script": script, "arguments": arguments, "environment": environment, "folder": folder, "log": str(log),
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())
        except BaseException:  # a time limit, or a parent that ended: neither it nor its fork is of use any more
            self.end()
            self._errors.seek(0)
            log.touch()
            sys.stderr.write(self._errors.read().decode(errors="replace")[-6000:])
            raise

    def end(self) -> None:
        """Kill it, with whatever runs below it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        _parents.pop(next(runner for runner, parent in _parents.items() if parent is self))


_parents: dict[str, _Parent] = {}


def _parent(runner: str) -> _Parent:
    if runner not in _parents:
        _parents[runner] = _Parent(runner)
    return _parents[runner]


@atexit.register
def _end_parents() -> None:
    for parent in list(_parents.values()):
        parent.end()


def outcomes_of(script: str, requests: Mapping[str, int]) -> Any:
    """A module's fixture: what a scenario reported in those of `CASES` that are given a number of `requests`.

    Fewer on V2, whose interpreted kernels take 0.05 s a step and more with each request.
    """

    @pytest.fixture(scope="module", params=requests)
    def outcome(request: pytest.FixtureRequest) -> dict[str, Any]:
        runner, mode = CASES[request.param]
        number = requests[request.param]
        return {
            **run_scenario(script, mode, str(number), runner=runner),
            "case": request.param,
            "requests": number,
        }

    return outcome
