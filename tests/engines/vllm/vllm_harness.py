"""Runs a scenario: a script that drives stock vLLM, in a process of its own, and reports what it saw as JSON.

vLLM's CPU worker changes torch for its whole process, and model runner V2 needs an environment that is set before
Python starts: a scenario is forked from a process that has imported vLLM for that runner and done nothing else. A
scenario checks many things with one start of the engine; tests then look at one of them each.
"""

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

SCENARIOS = Path(__file__).parent / "scenarios"

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
        code = Fork(runner, SCENARIOS / f"{script}.py", arguments, environment, scratch, log).wait()
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


class Fork:
    """A script in a fork of the process that has imported vLLM for a model runner (see warm_parent.py)."""

    def __init__(
        self,
        runner: str,
        script: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: str | Path,
        log: Path,
    ) -> None:
        job = {
            "script": str(script), "arguments": arguments, "environment": environment,
            "folder": str(folder), "log": str(log),
        }  # fmt: skip
        log.touch()
        errors = _folder() / f"{runner}.log"
        self._connection = _connected(runner, errors)
        self._connection.sendall(f"{json.dumps(job)}\n".encode())
        answer = self._connection.recv(4)
        if not answer:
            raise RuntimeError(f"nothing can be forked for {runner}:\n{errors.read_text(errors='replace')[-6000:]}")
        self.pid = int.from_bytes(answer, "little")

    def wait(self) -> int:
        """Its exit code, or -1 if something killed it. An exception while it is waited for, as a time limit is, kills
        it, with whatever runs below it."""
        try:
            ended = os.pidfd_open(self.pid)
            try:
                select.select([self._connection, ended], [], [])
            finally:
                os.close(ended)
        except ProcessLookupError:  # it has ended
            pass
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise
        try:
            answer = self._connection.recv(4, socket.MSG_DONTWAIT)
        except BlockingIOError:  # it ended without a word, and something below it runs
            answer = b""
        return int.from_bytes(answer, "little") if answer else -1


def _connected(runner: str, errors: Path) -> socket.socket:
    """A connection to the parent of this runner's forks, which the first to ask starts for all processes of the run."""
    run = os.environ["TRIMTAB_TEST_RUN"]
    name = f"\0trimtab-tests-{run}-{runner}"
    with (_folder() / "lock").open("w") as lock, socket.socket(socket.AF_UNIX) as listener:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            listener.bind(name)
        except OSError:  # it runs
            pass
        else:
            listener.listen()
            parent = Path(__file__).parent / "warm_parent.py"
            with errors.open("w") as output:
                subprocess.Popen(
                    [sys.executable, str(parent), str(listener.fileno()), run], pass_fds=[listener.fileno()],
                    env=_environment(runner), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    start_new_session=True,
                )  # fmt: skip
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(name)
    return connection


def _folder() -> Path:
    """A folder of this run of the tests."""
    return Path(os.environ["VLLM_CACHE_ROOT"]).parent


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
