"""A run of the GPU tests alone (`-m gpu`) imports only the files that hold some.

A GPU machine then needs torch, triton, numpy and pytest, and none of the engines that other tests import.
"""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files and folders without a GPU test where only those are asked for."""
    if config.getoption("markexpr") != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text() for file in files) else True
