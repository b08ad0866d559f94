"""Code that was compiled from an older trimtab is not found again, though torch keeps it on disk by the graph."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.version import PACKAGE, code_version

COMPILED = """
import torch
from torch import nn
from trimtab.ops import ROWS_ONLY, Emission, emit, register_steering_buffers, set_emission
from trimtab.sites import HookPoint

module = nn.Module()
register_steering_buffers(module, 8, max_tokens=4, max_rows=3, dtype=torch.float32)
module.steering_table_post_block[1:] = 1.0
module.steering_index[:3] = torch.arange(3)
set_emission(module, Emission(traced=True, terms=ROWS_ONLY))
steer = torch.compile(lambda x: emit(module, HookPoint.POST_BLOCK, x), fullgraph=True)
print(steer(torch.zeros(3, 8)).sum(-1).tolist())
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"])
"""


def compiled(source: Path, caches: Path) -> tuple[str, int]:
    """What tokens on rows 0, 1 and 2 receive in a process of its own, and how many graphs came from the cache."""
    environment = os.environ | {"PYTHONPATH": str(source), "TORCHINDUCTOR_CACHE_DIR": str(caches)}
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    numbers, hits = run.stdout.splitlines()
    return numbers, int(hits)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what this trimtab compiles to."""
    folder = tmp_path_factory.mktemp("inductor")
    assert compiled(PACKAGE.parent, folder) == ("[0.0, 8.0, 8.0]", 0)
    return folder


def test_the_same_code_is_found_again(caches: Path) -> None:
    assert compiled(PACKAGE.parent, caches) == ("[0.0, 8.0, 8.0]", 1)


def test_other_code_of_the_lowering_is_compiled_anew(caches: Path, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "trimtab", ignore=shutil.ignore_patterns("__pycache__", "model"))
    gather = tmp_path / "trimtab/ops/gather.py"
    before = gather.read_text()
    after = before.replace("ops.gt(row, ops.constant(0,", "ops.gt(row, ops.constant(1,")
    assert after != before
    gather.write_text(after)
    assert compiled(tmp_path, caches) == ("[0.0, 0.0, 8.0]", 0)


def test_the_version_of_code_changes_with_every_file_and_with_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "ops/b.py").write_text("y = 1")
    monkeypatch.setattr("trimtab.version.PACKAGE", tmp_path)
    seen = []
    for change in ("x = 1", "x = 2"):
        (tmp_path / "a.py").write_text(change)
        seen.append((code_version.__wrapped__(), code_version.__wrapped__("ops")))
    (tmp_path / "ops/b.py").rename(tmp_path / "ops/c.py")
    seen.append((code_version.__wrapped__(), code_version.__wrapped__("ops")))
    wholes, parts = zip(*seen, strict=True)
    assert len(set(wholes)) == 3
    assert parts[0] == parts[1] != parts[2]
