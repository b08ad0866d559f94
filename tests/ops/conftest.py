from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kernel_recorders import Recorders


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator["Recorders"]:
    """The kernels' launches, recorded, with operators on CPU tensors launching them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernel_recorders import recorded_kernels

    with recorded_kernels(monkeypatch) as recorders:
        yield recorders
