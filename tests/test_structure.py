"""What imports what, at the top of a file or later: no circles, nothing upwards in architecture.md's table."""

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "trimtab"
FACES = {"trimtab", "trimtab.__main__"}  # they hand on what is in the package


def _structure() -> Any:
    spec = importlib.util.spec_from_file_location("draw_structure", ROOT / "tools" / "draw_structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.imports = cache(module.imports)  # a second for each look at all files
    return module


structure = _structure()


def order() -> dict[str, int]:
    """How low each folder stands, as the table has it."""
    page = (ROOT / "docs" / "design" / "architecture.md").read_text()
    table = page.partition("| where | holds |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    return {place.removesuffix(".py"): depth for depth, places in enumerate(rows) for place in places}


def circles(source: Path) -> list[str]:
    """The files that import each other, by way of others too."""
    graph = structure.imports(source)
    return sorted(name for name in graph if name in structure.reachable(graph, name))


def upward(source: Path) -> list[str]:
    """Imports of what stands in no row below the importing file's own, save within one folder."""
    depth, files = order(), structure.modules(source).items()
    places = {name: structure.room(path.relative_to(source)).removesuffix(".py") for name, path in files}
    return sorted(
        f"{name} -> {used}"
        for name, others in structure.imports(source).items()
        for used in others
        if name not in FACES
        and places[name] != places[used]
        and (used in FACES or depth[places[name]] >= depth[places[used]])
    )


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(SOURCE) == []


def test_nothing_is_imported_from_above() -> None:
    assert upward(SOURCE) == []


def test_one_engine_knows_nothing_of_the_other() -> None:
    graph = structure.imports(SOURCE)
    engines = ("trimtab.engines.vllm", "trimtab.engines.transformers")
    crossing = [
        f"{name} -> {used}"
        for one, other in (engines, engines[::-1])
        for name in graph
        if name.startswith(one)
        for used in structure.reachable(graph, name)
        if used.startswith(other)
    ]
    assert crossing == []


def test_only_what_installs_patches_and_what_prints_them_imports_them() -> None:
    patches = "trimtab.engines.vllm.patches"
    outside = {
        name
        for name, others in structure.imports(SOURCE).items()
        if not name.startswith(patches) and any(used.startswith(patches) for used in others)
    }
    assert {name.removeprefix("trimtab.engines.vllm.").partition(".")[0] for name in outside} <= {"plugin", "doctor"}


@pytest.mark.parametrize(
    ("line", "rounds", "rises"),
    [
        ("from trimtab.engines.vllm.patches.core import TABLE", True, True),
        ("def later():\n    import trimtab.engines.vllm.core.checks", True, False),
        ("def later():\n    from . import checks", True, False),
        ("def later():\n    from ..core.checks import check_request", True, False),
        ("def later():\n    from trimtab.engines.vllm.frontend import requests", False, True),
        ("def later():\n    from trimtab import __version__", False, True),
        ("def later():\n    return import_module('trimtab.engines.vllm.worker.worker')", False, True),
        ("from trimtab.serving import memo", False, False),
    ],
)
def test_an_arrow_that_should_not_be_is_seen(tmp_path: Path, line: str, rounds: bool, rises: bool) -> None:
    """Each line is added to a file that `core.checks` imports, in a copy of the package."""
    copy = tmp_path / "trimtab"
    for path in SOURCE.rglob("*.py"):
        to = copy / path.relative_to(SOURCE)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(path.read_text())
    file = copy / "engines" / "vllm" / "core" / "another.py"
    file.write_text(line + "\n")
    checks = file.with_name("checks.py")
    checks.write_text(checks.read_text() + "\nfrom trimtab.engines.vllm.core.another import later\n")
    assert bool(circles(copy)) == rounds
    assert bool(upward(copy)) == rises
