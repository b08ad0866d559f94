"""The start-up check: a canary vector at each site must change what the model returns.

It finds what no reading of the configuration can: a stale compile artifact, a layer whose class was taken for another
convention, a model that goes around its layers' `forward`. One forward pass tests many sites, since token i of a dummy
batch is steered at site i alone. Behind a monitor that is shut the same canaries must change nothing, from its site on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.vllm.attach import Attachment
from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.ops.args import NO_THRESHOLD
from trimtab.sites import Site

_STRENGTH = 64.0  # far above rounding in any dtype, far below float16's range


def require_live_sites(worker: Any, attachment: Attachment, is_v2: bool, monitor: Site | None = None) -> None:
    """Raise `SteeringError` naming each site of this rank whose canary changes nothing, and each that an engine's
    monitor, read at the site `monitor`, does not reach. Leaves the buffers as new.
    """
    buffers = attachment.buffers
    if not buffers.sites:
        return
    forward = _forward_v2(worker) if is_v2 else _forward_v1(worker)
    chunk = min(int(worker.vllm_config.scheduler_config.max_num_seqs), buffers.table.shape[1] - 1)
    total = len(buffers.sites)
    chunks = [range(start, min(start + chunk, total)) for start in range(0, total, chunk)]
    # Dummy weights may overflow, which shows nothing either way: such sites are neither dead nor unreached.
    dead = [site for places in chunks for site, moved in _moved(buffers, places, forward) if not moved]
    if dead:
        raise SteeringError(
            "steering",
            f"steering has no effect at {', '.join(map(str, dead))}: this engine would answer unsteered and does not "
            "start. This is a fault of trimtab with this model and version of vLLM; please report it",
        )
    if monitor not in buffers.sites:
        return
    behind = range(buffers.sites.index(monitor), total)
    chunks = [range(start, min(start + chunk, total)) for start in range(behind.start, total, chunk)]
    unreached = [site for places in chunks for site, moved in _moved(buffers, places, forward, monitor) if moved]
    if unreached:
        raise SteeringError(
            "steering.monitor",
            f"has no effect at {', '.join(map(str, unreached))}: this engine would answer as if it had none and does "
            "not start. This is a fault of trimtab with this model and version of vLLM; please report it",
        )


def _moved(
    buffers: SteeringBuffers, places: range, forward: Callable[[int], Tensor], shut: Site | None = None
) -> list[tuple[Site, bool]]:
    """Whether the canary of each site changes what the model returns, with the monitor of a site `shut` if one is
    given. Sites at which what it returns is not finite are left out."""
    count = len(places)
    tokens = max(count, 2)  # a batch of one token is a shape of its own to compilers
    quiet, again = forward(tokens), forward(tokens)
    with _canaries(buffers, places), _shut_monitor(buffers, shut):
        loud = forward(tokens)
    noise = 4 * (quiet - again).abs().amax(dim=-1)  # kernels may add in another order each time
    moved = (loud - quiet).abs().amax(dim=-1) > noise
    finite = quiet.isfinite().all(dim=-1)
    return [(buffers.sites[place], bool(moved[token])) for token, place in enumerate(places) if finite[token]]


@contextmanager
def _canaries(buffers: SteeringBuffers, places: range) -> Iterator[None]:
    count, width = len(places), buffers.table.shape[2]
    pattern = torch.where(torch.arange(width) % 3 == 0, _STRENGTH, -_STRENGTH / 4).to(buffers.table)
    try:
        for token, place in enumerate(places):
            buffers.table[place, token + 1] = pattern
            buffers.any_active[place] = True
            buffers.index[token] = token + 1
        yield
    finally:
        buffers.index[:count] = 0
        buffers.any_active[places.start : places.stop] = False
        buffers.table[places.start : places.stop, 1 : count + 1] = 0


@contextmanager
def _shut_monitor(buffers: SteeringBuffers, site: Site | None) -> Iterator[None]:
    """Let the monitor of `site` open for no token, and count every token as decode, which it acts on."""
    if site is None:
        yield
        return
    place, params = buffers.sites.index(site), buffers.monitor_params
    try:
        params[place, 0], params[place, 2] = -NO_THRESHOLD, 1.0  # the probe is still zero, and so is each score
        buffers.monitor_active[place] = True
        buffers.decode_mask.fill_(1.0)
        yield
    finally:
        params[place, 0], params[place, 2] = 0.0, 0.0
        buffers.monitor_active[place] = False
        buffers.decode_mask.zero_()
        buffers.row_gate.fill_(1.0)


def _forward_v1(worker: Any) -> Callable[[int], Tensor]:
    runner = worker.model_runner

    def forward(tokens: int) -> Tensor:
        with _recorded(runner, "model") as results:
            # Without attention its result would be whatever the memory holds, which may drown a canary.
            last = runner._dummy_run(tokens, force_attention=True)[0]
        return _stream(results[-1] if results else last, tokens)

    return forward


def _forward_v2(worker: Any) -> Callable[[int], Tensor]:
    runner = worker.model_runner

    def forward(tokens: int) -> Tensor:
        with _recorded(runner, "execute_model") as results:
            last = runner._dummy_run(tokens)[0]
        return _stream(results[-1] if last is None else last, tokens)

    return forward


class _Recorder:
    """Stands in for a callable and keeps what it returns; everything else is the callable's own."""

    def __init__(self, target: Any, results: list[Any]) -> None:
        self._target, self._results = target, results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._target(*args, **kwargs)
        self._results.append(result)
        return result


@contextmanager
def _recorded(owner: Any, name: str) -> Iterator[list[Any]]:
    results: list[Any] = []
    own = name in owner.__dict__
    target = getattr(owner, name)
    setattr(owner, name, _Recorder(target, results))
    try:
        yield results
    finally:
        if own:
            setattr(owner, name, target)
        else:
            delattr(owner, name)


def _stream(output: Any, tokens: int) -> Tensor:
    """What a model returned, as float32 [tokens, ...]: its hidden states, or all it sends to the next stage."""
    tensors = getattr(output, "tensors", None)
    if tensors is not None:
        parts = [tensors[name] for name in sorted(tensors)]
    else:
        parts = [output[0] if isinstance(output, (tuple, list)) else output]
    return torch.cat([part[:tokens].float().reshape(tokens, -1) for part in parts], dim=-1)
