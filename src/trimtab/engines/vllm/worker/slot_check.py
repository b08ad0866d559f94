"""The start-up check of slots: each acts where it can, reads what the stream is there, and heeds its gate.

Token i of a dummy batch has a slot at the i-th site that clamps the canary's direction far from where it is. The model
must then return something else; and that again, not what it returns unsteered, where as much was taken from the stream
along that direction before: the clamp puts it where it was asked to. Behind a gate that is open it must do the same,
and behind one that is shut nothing. The slots of a token are tried in turn.

This is seen in the passes that serve, of which only the end is seen. In passes without compiled code and graphs the
stream behind a layer is seen, too: a slot at `post_block` that ablates the very direction of it must leave nothing
along that. It would leave a part if it read a part.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.dummy_passes import Forward, dummy_forward, is_compiled_whole, uncompiled
from trimtab.engines.vllm.worker.response_check import require_right_responses
from trimtab.engines.vllm.worker.row_sizes import streams
from trimtab.engines.vllm.worker.startup_check import (
    STRENGTH,
    Change,
    canaries,
    canary_pattern,
    changes,
    chunked,
    fault,
    gate_of_each,
)
from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.ops.host import awake
from trimtab.responses import CLIP
from trimtab.sites import HookPoint, Site, site_order

_SAME = 0.5  # of what a slot changes: what lies nearer is the same but for rounding
_LEFT = 0.1  # of the stream along its own direction: more than rounding leaves in any dtype

FIELD = "steering.slots"

logger = logging.getLogger("vllm.trimtab")


def require_live_slots(worker: Any, attachment: Attachment, is_v2: bool) -> None:
    """Raise `SteeringError` naming each site of this rank at which a slot changes nothing, does not put the stream
    where it was asked to, or does not heed its gate. Leaves the buffers as new.
    """
    buffers = attachment.buffers
    if buffers.slots is None or not buffers.slots.sites:
        return
    most = min(int(worker.vllm_config.scheduler_config.max_num_seqs), (buffers.table.shape[1] - 1) // 2)
    with awake(buffers.states):
        _require_live_slots(buffers, dummy_forward(worker, is_v2), attachment.probe_sites, most)
        _require_whole_reads(worker, attachment, is_v2, most)
        require_right_responses(worker, attachment, is_v2)


def _require_live_slots(buffers: SteeringBuffers, forward: Forward, probe_sites: Sequence[Site], most: int) -> None:
    assert buffers.slots is not None
    places = [place for place, site in enumerate(buffers.sites) if buffers.slots.position(site) is not None]

    def found(those: list[int], loud: Callable[[Sequence[int]], AbstractContextManager[None]]) -> list[Change]:
        return [change for part in chunked(those, most) for change in changes(buffers, part, forward, loud(part))]

    due = found(places, partial(_slots, buffers))
    if dead := [change.site for change in due if not change.is_one]:
        raise fault(FIELD, "a slot has no effect", dead, "as if it had none")
    sizes = {change.site: change.size for change in due}
    held = found(places, partial(_slots, buffers, taken=True))
    if wrong := [change.site for change in held if change.size < _SAME * sizes.get(change.site, 0.0)]:
        raise fault(FIELD, "a slot does not bring the stream to where it was asked", wrong, "steered otherwise")
    behind = [place for place in places if probe_sites and _reaches(probe_sites[0], buffers.sites[place])]
    for shut, what, how in (
        (False, "a slot behind an open gate has no effect", "unsteered"),
        (True, "a shut gate of a slot has no effect", "as if it had no gates"),
    ):
        reached = found(behind, partial(_slots, buffers, probe_sites=probe_sites, shut=shut))
        if faulty := [change.site for change in reached if change.is_one is shut]:
            raise fault(FIELD, what, faulty, how)


def _require_whole_reads(worker: Any, attachment: Attachment, is_v2: bool, most: int) -> None:
    """Where there is no reading nothing is refused: see `row_sizes`."""
    buffers = attachment.buffers
    assert buffers.slots is not None
    behind = {site for site in buffers.slots.sites if site.hook is HookPoint.POST_BLOCK}
    places = [place for place, site in enumerate(buffers.sites) if site in behind and site.layer in attachment.layers]
    if not places or is_compiled_whole(model := worker.model_runner.get_model()):
        return
    left: dict[Site, float] = {}
    try:
        forward = dummy_forward(worker, is_v2, eager=True)
        with uncompiled(model):
            for part in chunked(places, most):
                sites = [buffers.sites[place] for place in part]
                layers = [site.layer for site in sites]
                before = streams(forward, attachment, layers)
                directions = torch.nn.functional.normalize(before, dim=-1).nan_to_num()
                with _slots(buffers, part, directions=directions, values=0.0):
                    after = streams(forward, attachment, layers)
                shares = (after * directions).sum(-1) / before.norm(dim=-1)
                left |= dict(zip(sites, shares.tolist(), strict=True))
    except Exception:  # whatever a model does in a mode that it is not served in, it may serve in its own
        logger.debug("What slots read was not measured: the passes for it failed", exc_info=True)
    if wrong := {site: share for site, share in left.items() if abs(share) > _LEFT}:
        found = ", ".join(f"{site} ({share:.2g})" for site, share in wrong.items())
        raise SteeringError(
            FIELD,
            f"a slot that takes a direction out of the stream leaves a part of it, at {found}: this engine would "
            "answer steered otherwise and does not start. This is a fault of trimtab with this model and version of "
            "vLLM; please report it",
        )


def _reaches(probe: Site, site: Site) -> bool:
    return site_order(probe) <= site_order(site)


@contextmanager
def _slots(
    buffers: SteeringBuffers,
    places: Sequence[int],
    *,
    directions: Tensor | None = None,
    values: float = STRENGTH,
    taken: bool = False,
    probe_sites: Sequence[Site] = (),
    shut: bool = False,
) -> Iterator[None]:
    """Token i has a slot at the i-th of `places`, which brings the stream along the i-th of `directions` [n, H], by
    default the canary's pattern, to `values` times it. Where `taken`, its row takes as much of the pattern away as a
    canary adds. With `probe_sites` it stands behind a gate."""
    slots, count, table = buffers.slots, len(places), buffers.table
    assert slots is not None
    along = canary_pattern(table.shape[2]).expand(count, -1) if directions is None else directions
    lengths = along.to(table.dtype).float().norm(dim=-1).clamp(min=1e-6).tolist()
    gates = gate_of_each(buffers, places, probe_sites, shut=shut) if probe_sites else nullcontext()
    try:
        with gates, canaries(buffers, places, -STRENGTH if taken else 0.0):
            for token, place in enumerate(places):
                at, length = slots.position(buffers.sites[place]), lengths[token]
                row, slot = token + 1, token % slots.form.count
                table[place, count + row] = along[token].to(table)
                # Every other token writes along the same direction by its name, where slots may write elsewhere.
                slots.rows[at, row, slot, 0] = count + row
                slots.rows[at, row, slot, 1] = count + row if slots.form.writes and token % 2 else 0
                slots.codes[at, row, slot, 0] = CLIP.code
                slots.codes[at, row, slot, 1] = token % buffers.gates.count + 1 if probe_sites and buffers.gates else 0
                own = (1 / length, 0.0, 1.0, values * length, values * length)  # the last three are the clip's own
                slots.params[at, row, slot, : len(own)] = torch.tensor(own)
                slots.mix[at, row, slot, slot] = 1 / length
            yield
    finally:
        slots.slab[:, : count + 1] = 0
        table[list(places), count + 1 : 2 * count + 1] = 0
