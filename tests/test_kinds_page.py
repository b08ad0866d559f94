"""docs/kinds.md can be followed: its kind is added in the two files that it shows, and its examples are taken."""

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


def shown(path: str) -> str:
    """The file that the page shows behind the first mention of its path."""
    found = re.search(rf"{re.escape(path)}[^`]*`?[^`]*```python\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None, path
    return found[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the kind's author has, with the page's two files in it."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "kinds_cases.py", tmp_path / "tests")
    for path in ("src/trimtab/spec/kinds/reflect.py", "tests/test_kind_reflect.py"):
        assert not (ROOT / path).exists()
        (tmp_path / path).write_text(shown(path))
    return tmp_path


def run(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_the_kind_of_the_page_is_added_by_the_files_that_it_shows(checkout: Path) -> None:
    tried = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kind_reflect.py")
    passed = run(checkout, *tried)
    assert "21 passed" in passed.stdout, passed.stdout + passed.stderr
    file = checkout / "src" / "trimtab" / "spec" / "kinds" / "reflect.py"
    file.write_text(file.read_text().replace("strength=2.0", "strength=1.0"))
    failed = run(checkout, *tried)
    assert "20 failed, 1 passed" in failed.stdout, failed.stdout + failed.stderr


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
    kinds = [Steering.parse({"interventions": [json.loads(example)]}).interventions[0].kind for example in examples]
    assert set(kinds) == NAMED


def test_every_kind_has_a_section() -> None:
    sections = set(re.findall(r"^## `(\w+)`$", PAGE, re.MULTILINE))
    assert sections >= NAMED
    assert set(re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE)) == NAMED
