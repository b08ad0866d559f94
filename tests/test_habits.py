"""What tests promise of themselves: no clocks, both halves, nothing skipped in silence, bounds that are tried."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent

POLL = {"engines/vllm/vllm_server.py"}  # asks a server until it answers; says what its log ends with if it never does


def test_no_test_reads_a_clock() -> None:
    clocks = {"monotonic", "perf_counter", "time", "process_time", "thread_time", "default_timer", "now"}
    clocks |= {f"{name}_ns" for name in clocks}
    read = [
        f"{path.relative_to(TESTS)}:{node.lineno}: {ast.unparse(node.func)}"
        for path in sorted(TESTS.rglob("*.py"))
        if path.relative_to(TESTS).as_posix() not in POLL
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in clocks
    ]
    assert read == []  # bound work instead: tests/work.py counts it


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that is complete, as make sees it, and whose Python only writes down what it is asked."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH|$@" >> {tmp_path}/asked\nexit 1\n')
    python.chmod(0o755)
    for stamp in (".base", ".dev", ".vllm"):
        (tmp_path / stamp).touch()
    return tmp_path


def test_both_halves_of_the_tests_run_and_the_command_fails_at_the_end(environment: Path) -> None:
    done = subprocess.run(
        ["make", f"VENV={environment}", "test"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    asked = (environment / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert [line.count("--ignore tests/engines/vllm") for line in asked] == [1, 0]
    assert "tests/engines/vllm" in asked[1]


SKIPPING = """
import pytest

def test_that_runs(): pass

@pytest.mark.{mark}
@pytest.mark.skipif(True, reason="not here")
def test_that_is_skipped(): pass
"""


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (SKIPPING.format(mark="vllm"), False),
        (SKIPPING.format(mark="gpu"), True),
        ("import pytest\npytest.importorskip('nobody_has_this')\ndef test_one(): pass", False),
        ("", False),  # no test at all
    ],
    ids=["a test", "one for a GPU", "a file", "an empty file"],
)
def test_where_every_test_must_run_a_skipped_one_has_failed(tmp_path: Path, text: str, passes: bool) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    vllm\n")
    (tmp_path / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    outcomes = [
        subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"TRIMTAB_TESTS_MUST_RUN": must_run},
            capture_output=True, text=True, check=False,
        ).returncode
        for must_run in "10"
    ]  # fmt: skip
    assert (outcomes[0] == 0) == passes
    assert outcomes[1] in (0, 5)  # 5: there was no test
