"""Patches are applied when a module is imported, once, and only to what they were written for.

Whatever vLLM has become, an engine without steering runs on, and one with steering says at start what is missing.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from trimtab.engines.vllm import plugin
from trimtab.engines.vllm.patches import frontend as frontend_patches
from trimtab.engines.vllm.patches import patching
from trimtab.engines.vllm.patches import settings as settings_patches
from trimtab.engines.vllm.patches.patching import Need, Patch, State, put_on, require
from trimtab.engines.vllm.patches.supported import require_supported
from trimtab.engines.vllm.patches.tables import TABLES, all_patches
from trimtab.errors import SteeringError

MODULE = "trimtab_test_target"


@pytest.fixture(autouse=True)
def a_list_of_problems_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "problems", [])
    monkeypatch.setattr(patching, "_waiting", {})
    monkeypatch.setattr(patching, "_installed", {})


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / f"{MODULE}.py").write_text("class Owner:\n    def greet(self, name, *rest):\n        return name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield MODULE
    sys.modules.pop(MODULE, None)
    sys.meta_path[:] = finders


def greeting(*first: str, method: str = "Owner.greet", exact: bool = False) -> Patch:
    def make(original: Any) -> Any:
        return lambda self, name, *rest: f"hello {original(self, name, *rest)}"

    return Patch(MODULE, method, first or ("self", "name"), make, exact)


def install(patch: Patch) -> None:
    patching.install_table([patch])


def test_a_module_is_patched_when_it_is_imported(target: str) -> None:
    install(greeting())
    assert target not in sys.modules
    assert importlib.import_module(target).Owner().greet("you") == "hello you"


def test_a_module_that_is_there_already_is_patched_at_once(target: str) -> None:
    owner = importlib.import_module(target).Owner
    install(greeting())
    assert owner().greet("you") == "hello you"


def test_a_patch_is_applied_once(target: str) -> None:
    install(greeting())
    install(greeting())
    owner = importlib.import_module(target).Owner
    install(greeting())
    require({target: Need.ALWAYS})
    assert owner().greet("you") == "hello you"


def test_a_module_that_was_being_imported_when_it_was_to_be_patched_is_patched_when_it_is_required(target: str) -> None:
    module = importlib.import_module(target)
    module.__spec__._initializing = True  # type: ignore[union-attr]
    install(greeting())
    assert module.Owner().greet("you") == "you"
    module.__spec__._initializing = False  # type: ignore[union-attr]
    require({target: Need.ALWAYS})
    assert module.Owner().greet("you") == "hello you"


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (greeting("self", "person"), "Owner.greet takes (self, name, rest)"),
        (greeting("self", "name", exact=True), "Owner.greet takes (self, name, rest)"),
        (greeting(method="Owner.leave"), "Owner.leave is gone"),
        (greeting(method="Elsewhere.greet"), f"{MODULE}.Elsewhere is gone"),
        (Patch(MODULE, "Owner.greet", (), lambda original: 1 / 0), "could not be patched (ZeroDivisionError"),
    ],
    ids=["another name", "more parameters", "no such method", "no such class", "a patch that fails"],
)
def test_what_is_not_as_expected_is_left_alone_and_stops_a_steered_engine_only(
    target: str, patch: Patch, said: str
) -> None:
    install(patch)
    assert importlib.import_module(target).Owner().greet("you") == "you"
    (problem,) = patching.problems
    assert said in problem
    with pytest.raises(SteeringError, match="trimtab does not know this vLLM") as caught:
        require({target: Need.ALWAYS})
    assert said in str(caught.value)


def raising(error: Exception) -> Callable[..., Any]:
    def import_module(name: str) -> ModuleType:
        raise error

    return import_module


GONE = ModuleNotFoundError("No module named 'vllm.a.b'", name="vllm.a.b")
NO_LIBRARY = ModuleNotFoundError("No module named 'soundfile'", name="soundfile")


@pytest.mark.parametrize(
    ("error", "need", "stops"),
    [
        (GONE, Need.ALWAYS, True),
        (GONE, Need.LIBRARIES, True),
        (GONE, Need.BY_VERSION, False),
        (ModuleNotFoundError("No module named 'vllm.a'", name="vllm.a"), Need.BY_VERSION, False),
        (ModuleNotFoundError("No module named 'vllm.c'", name="vllm.c"), Need.BY_VERSION, True),
        (ImportError("cannot import name 'X' from 'vllm.c'", name="vllm.c"), Need.LIBRARIES, True),
        (NO_LIBRARY, Need.ALWAYS, False),
        (NO_LIBRARY, Need.LIBRARIES, False),
        (ImportError("Please install vllm[audio]"), Need.LIBRARIES, False),
        (OSError("libsndfile.so: cannot open"), Need.LIBRARIES, False),
        (ImportError("moved"), Need.ALWAYS, True),
        (RuntimeError("changed"), Need.ALWAYS, True),
        (RuntimeError("changed"), Need.BY_VERSION, True),
    ],
    ids=lambda value: value.name if isinstance(value, Need) else str(value),
)
def test_a_part_whose_libraries_are_missing_is_no_problem_and_one_that_has_moved_is(
    monkeypatch: pytest.MonkeyPatch, error: Exception, need: Need, stops: bool
) -> None:
    monkeypatch.setattr(patching.importlib, "import_module", raising(error))
    if stops:
        with pytest.raises(SteeringError, match=r"vllm\.a\.b cannot be imported"):
            require({"vllm.a.b": need})
    else:
        require({"vllm.a.b": need})


def test_a_loader_that_cannot_be_watched_imports_as_ever() -> None:
    class Loader:
        __slots__ = ()

        def exec_module(self, module: ModuleType) -> None: ...

    patching._apply_after_execution(Loader(), "vllm.somewhere")
    assert "cannot be watched" in patching.problems[0]


def test_an_instance_whose_method_looks_different_is_an_error(target: str) -> None:
    owner = importlib.import_module(target).Owner()
    with pytest.raises(SteeringError, match=r"trimtab does not know this vLLM: .*greet"):
        put_on(owner, [greeting("self", "scheduler_output")])


def test_a_patch_says_how_it_stands(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(patch: Patch) -> State:
        return patch.state()[0]

    shared, of_each = greeting(), replace(greeting(), on="each owner")
    assert [state(shared), state(of_each)] == [State.WAITING] * 2
    patching.install_table([shared, of_each])
    owner = importlib.import_module(target).Owner
    assert [state(shared), state(of_each)] == [State.APPLIED] * 2  # of one target: what stands there is ours
    monkeypatch.setattr(owner, "greet", lambda self, name: name)
    assert state(of_each) == State.READY
    assert state(shared) == State.UNFIT  # it fits, and somebody else's is there all the same
    monkeypatch.setattr(owner, "greet", lambda self, person: person)
    for patch in (shared, of_each):
        assert patch.state() == (State.UNFIT, "Owner.greet takes (self, person), not (self, name, ...)")
    assert state(greeting(method="Owner.leave")) == state(greeting(method="Elsewhere.greet")) == State.UNFIT
    assert state(replace(greeting(method="Elsewhere.greet"), optional=True)) == State.NOT_NEEDED
    assert state(Patch(MODULE, "Owner.count", (), lambda original: original, on="each")) == State.UNFIT
    monkeypatch.setattr(owner, "__init__", lambda self: setattr(self, "a", self.count), raising=False)
    assert state(Patch(MODULE, "Owner.count", (), lambda original: original, on="each")) == State.READY


def test_a_patch_that_adds_leaves_alone_what_another_has_put_there(target: str) -> None:
    owner = importlib.import_module(target).Owner
    kept, added = owner.greet, [replace(greeting(method=f"Owner.{name}"), adds=True) for name in ("greet", "leave")]
    patching.install_table(added)
    assert owner.greet is kept
    assert [patch.state()[0] for patch in added] == [State.UNFIT, State.APPLIED]
    assert patching.problems == [f"{MODULE}.Owner.greet is there already"]


PATCHES = all_patches()


@pytest.mark.vllm
@pytest.mark.parametrize(
    "patch", [patch for patch in PATCHES if not patch.on], ids=lambda patch: f"{patch.module}.{patch.target}"[5:]
)
def test_a_vllm_module_without_what_is_patched_is_imported_unharmed_and_noted(
    monkeypatch: pytest.MonkeyPatch, patch: Patch
) -> None:
    """The real functions over a module that holds nothing, as after a move to another place."""
    monkeypatch.setitem(sys.modules, patch.module, ModuleType(patch.module))
    install(patch)
    if patch.optional:
        return
    assert patching.problems
    with pytest.raises(SteeringError, match="does not know this vLLM"):
        patching.require_known()


def test_a_vllm_that_has_changed_makes_configurations_and_front_ends_as_ever_unless_they_are_steered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patching.note("vllm.v1.engine.input_processor.InputProcessor is gone")
    monkeypatch.setattr(settings_patches, "require_supported", patching.require_known)
    plain, steered = (SimpleNamespace(additional_config=config) for config in ({}, {"steering": {}}))
    create = settings_patches._check_the_configuration(lambda self, config: config)
    make = frontend_patches._make_the_front_end(lambda self, config: setattr(self, "made", config))
    assert create(None, plain) is plain
    processor = SimpleNamespace()
    make(processor, plain)
    assert processor.made is plain
    for start in (lambda: create(None, steered), lambda: make(SimpleNamespace(), steered)):
        with pytest.raises(SteeringError, match="InputProcessor is gone"):
            start()


def test_the_entry_point_raises_nothing_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("changed")

    monkeypatch.setattr(patching, "install_table", fail)
    plugin.register()
    assert len(patching.problems) == len(TABLES)


def test_each_patch_says_why_it_exists_and_until_when() -> None:
    for patch in PATCHES:
        assert patch.why.startswith("Why: "), patch.target
        assert "Until:" in patch.why, patch.target


@pytest.mark.vllm
class TestOnThisVllm:
    def test_a_supported_version_with_known_signatures_passes(self) -> None:
        plugin.register()
        require_supported()

    @pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0"])
    def test_another_version_is_refused(self, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
        import vllm

        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(SteeringError, match=r"is not supported: versions 0\.26 to 0\.33 are"):
            require_supported()

    def test_the_start_log_does_not_say_that_our_routes_are_left_out_and_says_so_of_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import vllm.plugins

        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        log = logging.getLogger("vllm.plugins")
        log.addHandler(handler)
        plugin.register()
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        found = [SimpleNamespace(name="trimtab")]
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found)
        try:
            for others in ([], [SimpleNamespace(name="another")]):
                found[1:] = others
                assert [plugin.name for plugin in vllm.plugins.load_endpoint_plugins(("generate",))] == ["trimtab"]
        finally:
            log.removeHandler(handler)
        assert len(said) == 1
        assert "['another']" in said[0]
