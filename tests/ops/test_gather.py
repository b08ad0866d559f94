"""What a compiler makes of reading table rows."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from trimtab.ops.gather import NAME, table_rows, teach_inductor

ROWS = torch.tensor([0, 3, 0, 1, 4])


@pytest.fixture(autouse=True)
def taught() -> None:
    teach_inductor()
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rows_are_those_of_the_table(dtype: torch.dtype) -> None:
    table = torch.randn(5, 24).to(dtype)
    table[0] = 0
    compiled = torch.compile(lambda rows: table_rows(table, rows).float() * 2, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(ROWS), table[ROWS].float() * 2)
    assert torch.equal(compiled(ROWS[:3]), table[ROWS[:3]].float() * 2)


def test_row_zero_is_not_read() -> None:
    table = torch.randn(5, 24)
    table[0] = float("nan")
    found = torch.compile(lambda rows: table_rows(table, rows) + 1, fullgraph=True)(ROWS)
    assert found[0].eq(1).all()
    assert found[2].eq(1).all()
    assert torch.equal(found[1], table[3] + 1)


def test_the_compiler_generates_code_for_it() -> None:
    """An operator that it does not know would be called, and would keep it from fusing."""
    table = torch.randn(5, 24)
    _, code = run_and_get_code(
        torch.compile(lambda rows, x: (x + table_rows(table, rows)).sum(-1)), ROWS, torch.ones(5, 24)
    )
    assert len(code) == 1
    assert "ops.trimtab" not in code[0]


def test_the_operator_is_described_right() -> None:
    torch.library.opcheck(getattr(torch.ops.trimtab, NAME).default, (torch.randn(5, 8), ROWS))
