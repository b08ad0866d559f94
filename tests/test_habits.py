"""What the tests promise about themselves: no clocks, both halves, nothing skipped in silence, every bound tried."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TESTS = Path(__file__).parent
ROOT = TESTS.parent
VERSIONS = TESTS / "support" / "versions"

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


def test_files_of_tests_have_different_names() -> None:
    """Files of one name in two folders cannot be collected together, and one of them would not run."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_versions_that_tests_run_on_are_the_ends_of_what_is_admitted(engine: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = Requirement(project["project"]["optional-dependencies"][engine][0])
    oldest, newest = (
        Version(re.search(rf"^{engine}==(.*)$", (VERSIONS / f"{engine}-{end}.txt").read_text(), re.M)[1])
        for end in ("oldest", "newest")
    )
    bounds = {bound.operator: Version(bound.version) for bound in extra.specifier}
    assert (extra.name, set(bounds)) == (engine, {">=", "<"})
    assert bounds[">="] == oldest
    assert bounds["<"] == Version(f"{newest.major}.{newest.minor + 1}")
    pinned = re.search(
        rf"\b{engine}==([\d.]+)", ((ROOT / "constraints.txt").read_text() + (ROOT / "Makefile").read_text())
    )
    assert oldest < Version(pinned[1]) <= newest


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that is complete, as make sees it, and whose Python only writes down what it is asked."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH|$@" >> {tmp_path}/asked\nexit 1\n')
    python.chmod(0o755)
    for stamp in (".base", ".dev", ".vllm", *(f"{file.stem}/.complete" for file in VERSIONS.iterdir())):
        (tmp_path / stamp).parent.mkdir(exist_ok=True)
        (tmp_path / stamp).touch()
    return tmp_path


def test_both_halves_of_the_tests_run_and_the_command_fails_at_the_end(environment: Path) -> None:
    asked = made(environment, "test")
    assert len(asked) == 2
    assert [line.count("--ignore tests/engines/vllm") for line in asked] == [1, 0]
    assert "tests/engines/vllm" in asked[1]


WANTED = {
    "vllm": ["start", "parity", "cache", "refus"],
    "transformers": ["engines/transformers", "instrument"],
    "oracles": ["tests/oracles"],
}


def test_every_version_is_tried_and_the_command_fails_at_the_end(environment: Path) -> None:
    asked = made(environment, "--keep-going", "test-versions", "test-oracles", f"FOLDER={environment}")
    runs = {Path(path).name: arguments for path, arguments in (line.split("|") for line in asked)}
    assert set(runs) == {path.stem for path in VERSIONS.iterdir()}
    for name, arguments in runs.items():
        assert all(word in arguments for word in WANTED[name.partition("-")[0]])


def made(environment: Path, *arguments: str) -> list[str]:
    """What the tests were called with by a make that fails."""
    command = ["make", f"VENV={environment}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return (environment / "asked").read_text().splitlines()


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
    for name in ("conftest.py", "schedule.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
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


SHARING = """
import pytest

pytestmark = pytest.mark.vllm

@pytest.fixture(scope="module", params=["one", "another"])
def engine(request):
    with open("started", "a") as file:
        file.write(request.param + "\\n")

@pytest.mark.parametrize("number", range(9))
def test_of_an_engine(engine, number): pass
"""


def test_an_engine_that_tests_share_is_started_by_one_process(tmp_path: Path) -> None:
    for name in ("conftest.py", "schedule.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    vllm\n")
    (tmp_path / "test_it.py").write_text(SHARING)
    options = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("PYTEST ="))
    command = [sys.executable, *options.partition("python")[2].split(), "-p", "no:cacheprovider", "-n", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert sorted((tmp_path / "started").read_text().split()) == ["another", "one"]
