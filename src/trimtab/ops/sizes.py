"""How much device memory a row costs, and how many fit a budget: tables are sized before any of them exists."""

import torch


def row_bytes(
    sites: int, hidden_size: int, dtype: torch.dtype, *, probes: bool = False, row_monitor_sites: int = 0
) -> int:
    """Bytes that one more row costs `SteeringBuffers` of so many sites: a line of each site's table and its scale.

    `probes` adds a line of the table of gates' probes, of which all sites share one; those of a row monitor are at
    `row_monitor_sites`. Up to alignment, which an even number of rows never needs for a width that is a multiple of 4.
    """
    each = sites * hidden_size * dtype.itemsize + 4
    if probes:
        each += 4 * hidden_size
    each += row_monitor_sites * (4 * hidden_size + 8)
    return each


def rows_within(budget: int, each: int, *, least: int, most: int) -> int:
    """How many rows of `each` bytes take at most `budget`, between `least` and `most`."""
    return max(least, min(most, budget // each))
