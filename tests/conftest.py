"""What every run of the tests shares: caches of its own, no clocks, and no test that is left out in silence.

A run of the GPU tests alone (`-m gpu`) imports only the files that hold some: a GPU machine then needs torch, triton,
numpy and pytest, and none of the engines that other tests import.
"""

import os
import shutil
import tempfile
from collections.abc import Generator
from importlib.metadata import distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from schedule import schedule, scheduler

CACHES = {  # the variable that names a cache of compiled code, and the folder of a run's own
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "VLLM_CACHE_ROOT": "vllm",
}
GROUPS = "TRIMTAB_TEST_GROUPS"  # the file in which the first of several processes says which tests belong together
RUN = "TRIMTAB_TEST_RUN"  # the id of the process whose end is the end of the run

if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # Hypothesis measures time by default, and a busy machine is no fault.
    settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("no clock")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files and folders without a GPU test where only those are asked for, and what other libraries are for
    where they are not."""
    if collection_path == Path(__file__).parent / "oracles" and "pyreft" not in "".join(_pins()):
        return True
    if config.getoption("markexpr") != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text() for file in files) else True


def pytest_configure(config: pytest.Config) -> None:
    """Give the run caches of its own, shared by its processes: code that an earlier run compiled proves nothing."""
    if hasattr(config, "workerinput"):
        return
    folder = Path(tempfile.mkdtemp(prefix="trimtab-caches-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for variable, name in CACHES.items():
        os.environ[variable] = str(folder / name)
    os.environ |= {GROUPS: str(folder / "groups.json"), RUN: f"{os.getpid()}"}
    # Inductor takes the processor's word for its vectors: a trial takes 15 s of CPU in each new cache.
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests, and group them for processes side by side."""
    schedule(items, Path(os.environ[GROUPS]) if os.environ.get("PYTEST_XDIST_WORKER") == "gw0" else None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole groups, where that is asked for."""
    return scheduler(config, log, Path(os.environ[GROUPS])) if config.getoption("dist") == "loadgroup" else None


def pytest_sessionstart() -> None:
    """Where versions are named, run on no other: a folder in front of the others may lack one, or come too late."""
    for line in _pins():
        name, _, wanted = line.partition("==")
        found = distribution(name)
        first = os.environ["PYTHONPATH"].split(os.pathsep)[0]
        packages = {file.parts[0] for file in found.files or () if file.name == "__init__.py"}
        places = [place and place.origin for place in map(find_spec, sorted(packages))]
        if found.version != wanted or not places or not all((place or "").startswith(first) for place in places):
            raise pytest.UsageError(f"these tests are to run on {line} of {first}, not on {found.version} of {places}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say at the end what the tests ran on."""
    found = [f"{name} {version(name)}" for name in ("torch", "transformers", "vllm") if find_spec(name)]
    terminalreporter.write_line(f"on {', '.join(found)}")


def _pins() -> list[str]:
    """The lines of the file of tests/support/versions that this run is for."""
    file = os.environ.get("TRIMTAB_TEST_VERSIONS")
    return [line for line in Path(file).read_text().split("\n") if line and line[0] != "#"] if file else []


def _must_run() -> bool:
    return os.environ.get("TRIMTAB_TESTS_MUST_RUN", "") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where every test must run, count one that was skipped as failed, unless it needs a GPU."""
    report = yield
    if report.skipped and _must_run() and item.get_closest_marker("gpu") is None:
        report.outcome, report.longrepr = "failed", f"skipped where every test must run: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file."""
    report = yield
    if report.skipped and _must_run():
        report.outcome, report.longrepr = "failed", f"skipped where every test must run: {report.longrepr}"
    return report
