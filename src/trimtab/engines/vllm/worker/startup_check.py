"""The start-up check: a canary vector at each site must change what the model returns.

It finds what no reading of the configuration can: a stale compile artifact, a layer whose class was taken for another
convention, a model that goes around its layers' `forward`. One forward pass tests many sites, since token i of a dummy
batch is steered at site i alone. Behind a gate that is open, or an open probe of a row, the same canaries must change
it too; behind one that is shut they must change nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.dummy_passes import Forward, dummy_forward
from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.ops.args import NO_THRESHOLD
from trimtab.ops.host import awake
from trimtab.program.joint_gate import Join
from trimtab.sites import Site, site_order

STRENGTH = 64.0  # far above rounding in any dtype, far below float16's range


def require_live_sites(worker: Any, attachment: Attachment, is_v2: bool) -> None:
    """Raise `SteeringError` naming each site of this rank whose canary changes nothing, and each that gates do not
    reach. Leaves the buffers as new.
    """
    if not attachment.buffers.sites:
        return
    with awake(attachment.buffers.states):  # warm-up may have run real steps, with nobody steered
        _require_live_sites(worker, attachment, is_v2)


def _require_live_sites(worker: Any, attachment: Attachment, is_v2: bool) -> None:
    buffers = attachment.buffers
    forward = dummy_forward(worker, is_v2)
    most = min(int(worker.vllm_config.scheduler_config.max_num_seqs), buffers.table.shape[1] - 1)

    def found(first: int, loud: Callable[[Sequence[int]], AbstractContextManager[None]], *, moving: bool) -> list[Site]:
        """The sites from `first` on whose canary changes the result (`moving`), or whose canary does not."""
        chunks = chunked(range(first, len(buffers.sites)), most)
        return [change.site for places in chunks for change in changes(buffers, places, forward, loud(places))
                if change.is_one is moving]  # fmt: skip

    dead = found(0, lambda places: canaries(buffers, places), moving=False)
    if dead:
        raise fault("steering", "steering has no effect", dead, "unsteered")
    if attachment.probe_sites:
        probed = buffers.sites.index(attachment.probe_sites[0])
        probes = attachment.probe_sites
        closed = found(probed, lambda places: _gated_canaries(buffers, places, probes, shut=False), moving=False)
        if closed:
            raise fault("steering.gates", "steering behind an open gate has no effect", closed, "unsteered")
        open_ones = found(probed, lambda places: _gated_canaries(buffers, places, probes, shut=True), moving=True)
        if open_ones:
            raise fault("steering.gates", "a shut gate has no effect", open_ones, "as if it had no gates")
    if buffers.row_monitor_sites:
        first = buffers.sites.index(buffers.row_monitor_sites[0])
        for shut, what, how in (
            (False, "steering behind an open probe of a row has no effect", "unsteered"),
            (True, "a row's probe has no effect", "as if it had no gates"),
        ):
            faulty = found(first, partial(_monitored_canaries, buffers, shut=shut), moving=shut)
            if wrong := [site for site in faulty if site in buffers.row_monitor_sites]:
                raise fault("steering.row_monitor", what, wrong, how)


def fault(field: str, what: str, sites: list[Site], how: str) -> SteeringError:
    """The error of an engine in which something is wrong at `sites`, and which would therefore answer in such a way."""
    return SteeringError(
        field,
        f"{what} at {', '.join(map(str, sites))}: this engine would answer {how} and does not start. This is a fault "
        "of trimtab with this model and version of vLLM; please report it",
    )


class Change(NamedTuple):
    """By how much something changes what the model returns, and by how much that differs from pass to pass anyway."""

    site: Site
    size: float
    noise: float

    @property
    def is_one(self) -> bool:
        """Whether something changed at all."""
        return self.size > self.noise


def changes(
    buffers: SteeringBuffers, places: Sequence[int], forward: Forward, loudly: AbstractContextManager[None]
) -> list[Change]:
    """What `loudly` does to the i-th token of a batch, by the sites at `places`.

    Sites at which the model's results are not finite are left out: dummy weights may overflow, which shows nothing
    either way.
    """
    count = len(places)
    tokens = max(count, 2)  # a batch of one token is a shape of its own to compilers
    quiet, again = forward(tokens), forward(tokens)
    with loudly:
        loud = forward(tokens)
    noise = 4 * (quiet - again).abs().amax(dim=-1)  # kernels may add in another order each time
    sizes = (loud - quiet).abs().amax(dim=-1)
    finite = quiet.isfinite().all(dim=-1)
    return [
        Change(buffers.sites[place], float(sizes[token]), float(noise[token]))
        for token, place in enumerate(places)
        if finite[token]
    ]


def chunked(places: Sequence[int], most: int) -> list[Sequence[int]]:
    """`places` in parts, so many in a pass at most."""
    return [places[start : start + most] for start in range(0, len(places), most)]


def canary_pattern(width: int) -> Tensor:
    """[H] float32: what is added at strength 1."""
    return torch.where(torch.arange(width) % 3 == 0, 1.0, -0.25)


@contextmanager
def canaries(buffers: SteeringBuffers, places: Sequence[int], strengths: Tensor | float = STRENGTH) -> Iterator[None]:
    """Steer token i at the i-th of `places`. `strengths` are one for all, or one for each token [n]."""
    count = len(places)
    try:
        buffers.index[:count] = torch.arange(1, count + 1, device=buffers.index.device)
        with in_rows(buffers, places, strengths):
            yield
    finally:
        buffers.index[:count] = 0


@contextmanager
def _gated_canaries(
    buffers: SteeringBuffers, places: Sequence[int], probe_sites: Sequence[Site], *, shut: bool
) -> Iterator[None]:
    """The same behind a gate each."""
    assert buffers.gates is not None
    with gate_of_each(buffers, places, probe_sites, shut=shut), in_rows(buffers, places):
        for token in range(len(places)):
            buffers.gates.rows[token, token % buffers.gates.count] = token + 1
        yield


@contextmanager
def gate_of_each(
    buffers: SteeringBuffers, places: Sequence[int], probe_sites: Sequence[Site], *, shut: bool
) -> Iterator[None]:
    """Token i has a gate, read at the probe site nearest before its site; it lets no row through yet. The gates of a
    token are tried in turn: it is number i, modulo their count. All but the first are joined to the one before, which
    decides what comes of it: they are `any` of themselves, shut, and an open one, or `all` of theirs, open, and a shut
    one."""
    gates, count = buffers.gates, len(places)
    assert gates is not None
    try:
        for token, place in enumerate(places):
            slot, site = token % gates.count, buffers.sites[place]
            here = max(gates.number(s) for s in probe_sites if site_order(s) <= site_order(site))
            # Hard gates of the probe in row 0, which is zero and so scores 0.
            decides, other = (-NO_THRESHOLD, NO_THRESHOLD) if shut else (NO_THRESHOLD, -NO_THRESHOLD)
            gates.sites[token, slot] = here
            gates.params[token, slot, :2] = torch.tensor([1.0, other if slot else decides])
            if slot:
                gates.sites[token, slot - 1] = here
                gates.params[token, slot - 1, 1] = decides
                gates.params[token, slot, -1] = (Join.ALL if shut else Join.ANY).code
        yield
    finally:
        gates.slab[:count] = 0
        gates.values.zero_()
        gates.gains.zero_()
        gates.owns.zero_()


@contextmanager
def _monitored_canaries(buffers: SteeringBuffers, places: Sequence[int], *, shut: bool) -> Iterator[None]:
    """The same with a probe of each row where rows can have them, and every token counted as decode, where it acts."""
    monitored = {site: place for place, site in enumerate(buffers.row_monitor_sites)}
    behind = [(monitored[site], row) for row, site in enumerate(map(buffers.sites.__getitem__, places), 1)
              if site in monitored]  # fmt: skip
    threshold = 0.5 * NO_THRESHOLD  # not quite: a row with that has no probe to read
    try:
        for place, row in behind:
            buffers.row_params[place, row, 0] = -threshold if shut else threshold  # a probe is zero, and so its score
        buffers.row_monitor_active.fill_(True)
        buffers.decode_mask.fill_(1.0)
        with canaries(buffers, places):
            yield
    finally:
        buffers.row_params[..., 0] = NO_THRESHOLD
        buffers.row_monitor_active.zero_()
        buffers.decode_mask.zero_()


@contextmanager
def in_rows(buffers: SteeringBuffers, places: Sequence[int], strengths: Tensor | float = STRENGTH) -> Iterator[None]:
    """Row i + 1 holds a canary at the i-th of `places`."""
    count, width = len(places), buffers.table.shape[2]
    at, rows = list(places), list(range(1, count + 1))
    pattern = canary_pattern(width).to(buffers.table.device)
    try:
        buffers.table[at, rows] = (torch.as_tensor(strengths).to(pattern).reshape(-1, 1) * pattern).to(buffers.table)
        buffers.any_active[at] = True
        yield
    finally:
        buffers.any_active[at] = False
        buffers.table[at, rows] = 0
