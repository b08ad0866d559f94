"""What slots did on each token, over all sites: sums of what every site has left in `SlotBuffers.corrections`."""

import torch
from torch import Tensor

AT_ONCE = 1 << 21  # numbers of (site, slot, token) that are held at one time: a long prompt's are summed in pieces


def slot_uses(places: Tensor, corrections: Tensor, token_rows: Tensor, most: int) -> Tensor:
    """Float32 [N, 2 * P] for N tokens on `token_rows` [N] with `corrections` [S, K, N]: of each of the P = `most`
    places the sum of |c|, and at how many sites c was not 0.

    A slot is summed at its place of `places` [S, R, K], whatever other slots act beside it from site to site. What
    stands at a site where a token has no such slot, as left by another pass, counts nowhere. Nothing waits.
    """
    sites, count, _ = corrections.shape
    sums = corrections.new_zeros(1 + most, 2, len(token_rows))  # the first takes what counts nowhere
    step = max(1, AT_ONCE // max(1, sites * count))
    for start in range(0, len(token_rows), step):
        rows = token_rows[start : start + step]
        here = slice(start, start + len(rows))
        into = torch.empty(sites, count, len(rows), dtype=torch.int64, device=rows.device)
        into = into.copy_(places[:, rows].movedim(2, 1)).flatten(0, 1)
        cells = corrections[:, :, here].flatten(0, 1)
        sums[:, 0, here].scatter_add_(0, into, cells.abs())
        sums[:, 1, here].scatter_add_(0, into, (cells != 0).float())
    return sums[1:].flatten(0, 1).T
