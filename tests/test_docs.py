"""What a reader of the documentation can rely on: links lead somewhere, and each flag, metric and route is told of."""

import argparse
import re
from pathlib import Path

import pytest

from trimtab import Steering, SteeringError, SteeringVector
from trimtab.engines.vllm.settings.flags import add_flags
from trimtab.sites import HookPoint, ModelSites, Site

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "src" / "trimtab"

CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    files = {file.name for file in (ROOT / "tests").rglob("*.py")} | {
        file.stem for file in (ROOT / "tests").rglob("*.py")
    }
    named = re.findall(r"`(?:[\w/]*/)?(test_\w+(?:\.py)?)`", page.read_text())
    assert set(named) - files == set()


def test_the_example_of_an_error_is_what_is_said() -> None:
    example = re.search(r'"message": "steering\.([^"]*) \.\.\."', (ROOT / "docs" / "serving.md").read_text())
    calm = SteeringVector({Site(0, HookPoint.POST_BLOCK): [1.0]})
    model = ModelSites(1, 1, frozenset(calm.sites))
    with pytest.raises(SteeringError) as caught:
        Steering.parse({"interventions": [{"kind": "add", "vector": "clam"}]}).resolve({"calm": calm}, model)
    assert example is not None
    assert str(caught.value).startswith(example[1])


def test_the_readme_lists_every_page() -> None:
    listed = set(re.findall(r"^\| \[([\w./-]+)\]", (ROOT / "README.md").read_text(), re.MULTILINE))
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md", "CHANGELOG.md"}
    assert listed == pages


def test_the_page_on_serving_tells_of_every_flag() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_flags(parser)
    told = set(re.findall(r"^\| `(--[\w-]+)", (ROOT / "docs" / "serving.md").read_text(), re.MULTILINE))
    assert told == {flag for action in parser._actions for flag in action.option_strings}


def test_the_pages_on_serving_and_gates_tell_of_every_metric() -> None:
    code = (PACKAGE / "serving" / "metrics.py").read_text()
    counters = {f"{name}_total" for name in re.findall(r'Counter\(\s*"(trimtab_\w+)"', code)}
    metrics = set(re.findall(r'"(trimtab_\w+)"', code)) - {name.removesuffix("_total") for name in counters} | counters
    assert len(metrics) > 10
    page = "".join((ROOT / "docs" / name).read_text() for name in ("serving.md", "gates.md"))
    assert {name for name in metrics if not re.search(rf"`{name}\b", page)} == set()


def test_the_page_on_serving_tells_of_every_route() -> None:
    code = "".join(file.read_text() for file in (PACKAGE / "engines" / "vllm" / "http").glob("*routes.py"))
    routes = set(re.findall(r'"(/v1/steering[\w/]*)', code)) - {"/v1/steering/"}
    assert routes == {"/v1/steering", "/v1/steering/gates/"}  # and those of names, whose paths are composed
    page = (ROOT / "docs" / "serving.md").read_text()
    rows = "\n".join(row for row in page.splitlines() if row.startswith("| `") or row.startswith("| the same"))
    for route in (*routes, "/v1/steering/vectors", "/v1/steering/probes"):
        assert re.search(rf"{route}(`|[A-Z{{])", rows), route
