"""Patches are applied when a module is imported, once, and only to what they were written for."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.engines.vllm import compat
from trimtab.errors import SteeringError

MODULE = "trimtab_test_target"


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / f"{MODULE}.py").write_text("class Owner:\n    def greet(self, name, *rest):\n        return name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(compat, "_problems", [])
    finders = list(sys.meta_path)
    yield MODULE
    sys.modules.pop(MODULE, None)
    sys.meta_path[:] = finders
    for finder in finders:  # one that another test's `install` left there outlives this one
        if isinstance(finder, compat._PatchingFinder):
            finder.patches.pop(MODULE, None)


def patch(first: tuple[str, ...] = ("self", "name"), exact: bool = False) -> Any:
    def apply(module: ModuleType) -> None:
        def wrap(original: Any) -> Any:
            return lambda self, name, *rest: f"hello {original(self, name, *rest)}"

        compat._patch(module.Owner, "greet", first, wrap, exact=exact)

    return apply


def test_a_module_is_patched_when_it_is_imported(target: str) -> None:
    compat._when_imported(target, patch())
    assert target not in sys.modules
    assert importlib.import_module(target).Owner().greet("you") == "hello you"


def test_a_module_that_is_there_already_is_patched_at_once(target: str) -> None:
    owner = importlib.import_module(target).Owner
    compat._when_imported(target, patch())
    assert owner().greet("you") == "hello you"


def test_a_patch_is_applied_once(target: str) -> None:
    owner = importlib.import_module(target).Owner
    compat._when_imported(target, patch())
    compat._when_imported(target, patch())
    assert owner().greet("you") == "hello you"


@pytest.mark.parametrize(
    ("first", "exact"), [(("self", "person"), False), (("self", "name"), True)], ids=["another name", "more parameters"]
)
def test_what_looks_different_is_left_alone_and_noted(target: str, first: tuple[str, ...], exact: bool) -> None:
    compat._when_imported(target, patch(first, exact))
    assert importlib.import_module(target).Owner().greet("you") == "you"
    (problem,) = compat._problems
    assert "Owner.greet takes (self, name, rest)" in problem


def test_a_method_that_is_gone_is_noted(target: str) -> None:
    compat._patch(importlib.import_module(target).Owner, "leave", ("self",), lambda original: original)
    assert compat._problems == ["Owner.leave is gone"]


def test_an_instance_whose_method_looks_different_is_an_error(target: str) -> None:
    owner = importlib.import_module(target).Owner()
    with pytest.raises(SteeringError, match=r"trimtab does not know this vLLM: .*greet"):
        compat.wrap_method(owner, "greet", ("scheduler_output",), lambda original: original)


@pytest.mark.vllm
class TestOnThisVllm:
    def test_a_supported_version_with_known_signatures_passes(self) -> None:
        compat.install()
        compat.require_supported()

    @pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0"])
    def test_another_version_is_refused(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        import vllm

        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(SteeringError, match=r"is not supported: versions 0\.26 to 0\.33 are"):
            compat.require_supported()

    def test_a_noted_problem_stops_a_steered_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compat, "_problems", ["EngineCore.preprocess_add_request is gone"])
        with pytest.raises(SteeringError, match="preprocess_add_request is gone"):
            compat.require_supported()
