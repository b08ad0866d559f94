"""The start-up check: a canary vector at each site must change what the model returns.

It finds what no reading of the configuration can: a stale compile artifact, a layer whose class was taken for another
convention, a model that goes around its layers' `forward`. One forward pass tests many sites, since token i of a dummy
batch is steered at site i alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.vllm.attach import Attachment
from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.sites import Site

_STRENGTH = 64.0  # far above rounding in any dtype, far below float16's range


def require_live_sites(worker: Any, attachment: Attachment, is_v2: bool) -> None:
    """Raise `SteeringError` naming each site of this rank whose canary changes nothing. Leaves the buffers as new."""
    buffers = attachment.buffers
    if not buffers.sites:
        return
    forward = _forward_v2(worker) if is_v2 else _forward_v1(worker)
    chunk = min(int(worker.vllm_config.scheduler_config.max_num_seqs), buffers.table.shape[1] - 1)
    dead: list[Site] = []
    for start in range(0, len(buffers.sites), chunk):
        dead += _dead_sites(buffers, range(start, min(start + chunk, len(buffers.sites))), forward)
    if dead:
        raise SteeringError(
            "steering",
            f"steering has no effect at {', '.join(map(str, dead))}: this engine would answer unsteered and does not "
            "start. This is a fault of trimtab with this model and version of vLLM; please report it",
        )


def _dead_sites(buffers: SteeringBuffers, places: range, forward: Callable[[int], Tensor]) -> list[Site]:
    count = len(places)
    tokens = max(count, 2)  # a batch of one token is a shape of its own to compilers
    quiet, again = forward(tokens), forward(tokens)
    with _canaries(buffers, places):
        loud = forward(tokens)
    noise = 4 * (quiet - again).abs().amax(dim=-1)  # kernels may add in another order each time
    moved = (loud - quiet).abs().amax(dim=-1) > noise
    finite = quiet.isfinite().all(dim=-1)  # dummy weights may overflow, which shows nothing either way
    alive = (moved | ~finite).tolist()
    return [buffers.sites[place] for token, place in enumerate(places) if not alive[token]]


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
