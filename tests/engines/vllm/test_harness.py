"""A scenario that does not come to its end, or tells nothing, is no success."""

import pytest
from vllm_harness import run_scenario

pytestmark = pytest.mark.vllm


def test_a_scenario_that_fails_says_why_and_does_not_stop_the_next() -> None:
    for name in ("nobody", "noone"):
        with pytest.raises(AssertionError, match=rf"{name} \(\) ended with 1:(.|\n)*FileNotFoundError"):
            run_scenario(name)


def test_a_scenario_that_reports_nothing_has_failed() -> None:
    with pytest.raises(AssertionError, match=r"support \(\) ended with 0"):
        run_scenario("support")  # a module that others import: it defines things, and ends
