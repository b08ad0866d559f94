"""A scenario that does not come to its end, or tells nothing, is no success."""

import os
from pathlib import Path

import pytest
from vllm_harness import Fork, run_scenario

pytestmark = pytest.mark.vllm


def test_a_scenario_that_fails_says_why_and_does_not_stop_the_next() -> None:
    for name in ("nobody", "noone"):
        with pytest.raises(AssertionError, match=rf"{name} \(\) ended with 1:(.|\n)*FileNotFoundError"):
            run_scenario(name)


def test_a_scenario_that_reports_nothing_has_failed() -> None:
    with pytest.raises(AssertionError, match=r"support \(\) ended with 0"):
        run_scenario("support")  # a module that others import: it defines things, and ends


def test_one_that_is_killed_has_failed_though_what_it_started_lives_on(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os, signal, time\nif os.fork(): os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(9)\n")
    assert Fork("v1", script, [], dict(os.environ), tmp_path, tmp_path / "log").wait() == -1
