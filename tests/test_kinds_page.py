"""docs/kinds.md can be followed: its kinds are added by the files and lines that it shows, its examples are taken."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kinds_cases import NAMED
from trimtab.spec import Steering

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "kinds.md").read_text()
KINDS = ("reflect", "soften")
SHARED = ("pyproject.toml", "tests/kinds_cases.py", "tests/kinds_device.py", "tests/response_formulas.py")


def files(kind: str) -> tuple[str, str]:
    """The kind's own file, and its test."""
    return f"src/trimtab/spec/kinds/{kind}.py", f"tests/test_kind_{kind}.py"


def shown(path: str) -> str:
    """The file that the page shows behind the first mention of its path."""
    found = re.search(rf"{re.escape(path)}[^`]*`?[^`]*```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None, f"docs/kinds.md no longer shows {path}"
    return found[1]


def apply(diff: str, checkout: Path) -> None:
    """Make the changes of a diff of the page: each of its pieces stands at one place."""
    for change in diff.split("+++ ")[1:]:
        path, _, pieces = change.partition("\n")
        for piece in pieces.rstrip("\n").split("\n@@\n"):
            lines = piece.split("\n")
            old, new = ("".join(line[1:] + "\n" for line in lines if line[:1] != sign) for sign in "+-")
            text = (checkout / path).read_text()
            assert text.count(old) == 1, f"docs/kinds.md changes what does not stand once in {path}:\n{old}"
            (checkout / path).write_text(text.replace(old, new))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a kind's author has, with all that the page shows in it."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "tests").mkdir()
    for path in SHARED:
        shutil.copy(ROOT / path, tmp_path / path)
    if not (ROOT / "src/trimtab/spec/kinds/soften.py").exists():  # of one who follows the page
        for diff in re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL):
            apply(diff, tmp_path)
    for path in (path for kind in KINDS for path in files(kind)):
        (tmp_path / path).write_text(shown(path))
    return tmp_path


def run(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_the_kind_of_the_page_is_added_by_the_files_that_it_shows(checkout: Path) -> None:
    tried = ("-m", "pytest", "-n", "0", "tests/test_kind_reflect.py")
    passed = run(checkout, *tried)
    assert "21 passed" in passed.stdout, passed.stdout + passed.stderr
    file = checkout / "src" / "trimtab" / "spec" / "kinds" / "reflect.py"
    file.write_text(file.read_text().replace("strength=2.0", "strength=1.0"))
    failed = run(checkout, *tried)
    assert "20 failed, 1 passed" in failed.stdout, failed.stdout + failed.stderr


def test_the_response_of_the_page_is_added_by_the_lines_that_it_shows(checkout: Path) -> None:
    passed = run(checkout, "-m", "pytest", "-n", "0", "tests/test_kind_soften.py")
    assert "9 passed" in passed.stdout, passed.stdout + passed.stderr


def test_what_the_page_shows_passes_make_lint(checkout: Path) -> None:
    for command in (("check",), ("format", "--check")):
        linted = run(checkout, "-m", "ruff", *command, "--no-cache", ".")
        assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_kind_of_the_page_comes_down_to_what_others_say(checkout: Path) -> None:
    """It shares sets, identities and the wire form with kinds that were there."""
    script = """
from kinds_cases import MODEL, resolve, vector
from trimtab.program.codec import decode, encode
found = resolve({"kind": "reflect", "vector": vector(1)}, {"kind": "clamp", "vector": vector(2), "max": 1})
same = resolve({"kind": "scale", "vector": vector(1), "factor": -1}, {"kind": "clamp", "vector": vector(2), "max": 1})
assert found == same
assert decode(encode(found), {}) == found
assert "reflect" in MODEL.slots.kinds
"""
    (checkout / "tests" / "try_it.py").write_text(script)
    tried = run(checkout, "tests/try_it.py")
    assert tried.returncode == 0, tried.stderr


def test_every_example_of_the_page_is_a_request() -> None:
    examples = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    kinds = {Steering.parse({"interventions": [json.loads(example)]}).interventions[0].kind for example in examples}
    assert NAMED - kinds == set(), "docs/kinds.md lacks an example in JSON of these kinds"


def test_every_kind_has_a_section_and_a_row_of_the_table() -> None:
    sections = set(re.findall(r"^## `(\w+)`$", PAGE, re.MULTILINE))
    assert NAMED - sections == set(), "docs/kinds.md lacks a section, ## `kind`, of these kinds"
    rows = set(re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE))
    assert NAMED - rows == set(), "docs/kinds.md lacks a row of these kinds in the table at its top"
    assert rows - NAMED == set(), "docs/kinds.md has rows of kinds that there are not"
