"""Rows of a table by number inside compiled graphs, where row 0 is zero and never read.

    torch.ops.trimtab.table_rows_{version}(Tensor table, Tensor rows) -> Tensor      table [R, H], rows [N] -> [N, H]

An operator of its own, because of what a compiler makes of PyTorch's: a plain gather reads row 0 for every token that
nobody steers and waits for it, and a masked one reads the number of the row once per element, so that it cannot load
neighbouring elements together. `teach_inductor` says how to do it; it stays fused with everything around it.

Compilers keep what they made on disk, and find it again by the graph: names of operators, not what they mean. So the
name of this one, which is in every graph that steers by traced code, holds the version of the code behind it.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trimtab.version import code_version

logger = logging.getLogger("trimtab")

NAME = f"table_rows_{code_version('ops')[:16]}"

_library = torch.library.Library("trimtab", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"{NAME}(Tensor table, Tensor rows) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl(NAME, lambda table, rows: table[rows], "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _fake(table: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty(rows.shape[0], table.shape[1])


torch.library.register_fake(f"trimtab::{NAME}", _fake, lib=_library)

_operator = getattr(torch.ops.trimtab, NAME).default


def table_rows(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]` [N, H], where row 0 must be zero."""
    if not torch.compiler.is_compiling():
        return table[rows]
    found: Tensor = _operator(table, rows)
    return found


def table_numbers(table: Tensor, rows: Tensor) -> Tensor:
    """`table[rows]` [N, M] of a table [R, M] of few numbers, of which the first row is read too.

    A compiler reads them once per token: a condition on the row would make it read them once per element of whatever
    they are multiplied with. It is told not to look whether the rows are within the table.
    """
    if not torch.compiler.is_compiling():
        return table[rows]
    found: Tensor = torch.ops.aten._unsafe_index.Tensor(table, [rows])
    return found


def stored(value: Tensor) -> Tensor:
    """`value`, contiguous and of one dimension or two, which the compiler now computes once and stores.

    It would otherwise repeat the whole sum wherever it is used, or keep a float32 copy for that. A view by strides is
    the one operation whose input a compiler must have in memory. It also lets a token's result be computed where its
    inputs are made, behind the norm that reads them too, instead of in front of the next one; and numbers that a token
    has only one of be computed once per token, and not once per element of what they are multiplied with.
    """
    sizes = (*value.shape,)  # one by one: vLLM, which cuts the graph, would hand on a whole size as several arguments
    return torch.as_strided(value, sizes, (*sizes[1:], 1))


@cache
def teach_inductor() -> None:
    """Make torch.compile generate code for `table_rows`. To be called before a steered module is first compiled.

    Where this torch has another Inductor than the one known here, the operator stays opaque to it: right, but slower.
    """
    try:
        from torch._inductor.ir import Pointwise
        from torch._inductor.lowering import register_lowering
        from torch._inductor.virtualized import ops
    except ImportError as error:
        logger.warning("Steering will be slower than it could be: this torch's Inductor is not known (%s)", error)
        return

    def lower(table: Any, rows: Any) -> Any:
        load_value, load_row = table.make_loader(), rows.make_loader()
        max_rows, width = table.get_size()

        def value(place: Any) -> Any:
            token, lane = place
            row = load_row([token])  # outside the mask: once per token
            at = ops.indirect_indexing(row, max_rows, check=False, wrap_neg=False)
            steered = ops.gt(row, ops.constant(0, rows.get_dtype()))
            return ops.masked(steered, lambda: load_value([at, lane]), 0.0)

        return Pointwise.create(
            device=table.get_device(), dtype=table.get_dtype(), inner_fn=value, ranges=[rows.get_size()[0], width]
        )

    register_lowering(_operator, type_promotion_kind=None)(lower)
