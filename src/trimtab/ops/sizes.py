"""How much device memory a row costs, and how many fit a budget: tables are sized before any of them exists."""

import torch

from trimtab.ops.args import SlotForm
from trimtab.ops.slot_buffers import slot_record


def row_bytes(
    sites: int,
    hidden_size: int,
    dtype: torch.dtype,
    *,
    probes: bool = False,
    row_monitor_sites: int = 0,
    slots: SlotForm | None = None,
    slot_sites: int = 0,
) -> int:
    """Bytes that one more row costs `SteeringBuffers` of so many sites: a line of each site's table and its scale.

    `probes` adds a line of the table of gates' probes, of which all sites share one; those of a row monitor are at
    `row_monitor_sites`. Slots of the form `slots` add a record at each of `slot_sites`. Up to alignment, which an even
    number of rows never needs for a width that is a multiple of 4.
    """
    each = sites * hidden_size * dtype.itemsize + 4
    if probes:
        each += 4 * hidden_size
    each += row_monitor_sites * (4 * hidden_size + 8)
    if slots is not None:
        each += slot_sites * slot_record(slots).itemsize
    return each


def rows_within(budget: int, each: int, *, least: int, most: int) -> int:
    """How many rows of `each` bytes take at most `budget`, between `least` and `most`."""
    return max(least, min(most, budget // each))
