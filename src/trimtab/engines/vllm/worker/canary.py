"""The start-up check: a canary vector at each site must change what the model returns.

It finds what no reading of the configuration can: a stale compile artifact, a layer whose class was taken for another
convention, a model that goes around its layers' `forward`. One forward pass tests many sites, since token i of a dummy
batch is steered at site i alone. Behind a gate that is open the same canaries must change it too; behind one that is
shut they must change nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.ops.args import NO_THRESHOLD
from trimtab.ops.host import awake
from trimtab.sites import Site, site_order

_STRENGTH = 64.0  # far above rounding in any dtype, far below float16's range


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
    forward = _forward_v2(worker) if is_v2 else _forward_v1(worker)
    most = min(int(worker.vllm_config.scheduler_config.max_num_seqs), buffers.table.shape[1] - 1)

    def found(first: int, canaries: Callable[[range], AbstractContextManager[None]], *, moving: bool) -> list[Site]:
        """The sites from `first` on whose canary changes the result (`moving`), or whose canary does not."""
        total = len(buffers.sites)
        chunks = [range(start, min(start + most, total)) for start in range(first, total, most)]
        return [site for places in chunks for site, moved in _moved(buffers, places, forward, canaries(places))
                if moved is moving]  # fmt: skip

    dead = found(0, lambda places: _canaries(buffers, places), moving=False)
    if dead:
        raise _fault("steering", "steering has no effect", dead, "unsteered")
    if attachment.probe_sites:
        probed = buffers.sites.index(attachment.probe_sites[0])
        probes = attachment.probe_sites
        closed = found(probed, lambda places: _gated_canaries(buffers, places, probes, shut=False), moving=False)
        if closed:
            raise _fault("steering.gates", "steering behind an open gate has no effect", closed, "unsteered")
        open_ones = found(probed, lambda places: _gated_canaries(buffers, places, probes, shut=True), moving=True)
        if open_ones:
            raise _fault("steering.gates", "a shut gate has no effect", open_ones, "as if it had no gates")


def _fault(field: str, what: str, sites: list[Site], how: str) -> SteeringError:
    return SteeringError(
        field,
        f"{what} at {', '.join(map(str, sites))}: this engine would answer {how} and does not start. This is a fault "
        "of trimtab with this model and version of vLLM; please report it",
    )


def _moved(
    buffers: SteeringBuffers, places: range, forward: Callable[[int], Tensor], canaries: AbstractContextManager[None]
) -> list[tuple[Site, bool]]:
    """Whether the canary of each site changes what the model returns.

    Sites at which that is not finite are left out: dummy weights may overflow, which shows nothing either way.
    """
    count = len(places)
    tokens = max(count, 2)  # a batch of one token is a shape of its own to compilers
    quiet, again = forward(tokens), forward(tokens)
    with canaries:
        loud = forward(tokens)
    noise = 4 * (quiet - again).abs().amax(dim=-1)  # kernels may add in another order each time
    moved = (loud - quiet).abs().amax(dim=-1) > noise
    finite = quiet.isfinite().all(dim=-1)
    return [(buffers.sites[place], bool(moved[token])) for token, place in enumerate(places) if finite[token]]


@contextmanager
def _canaries(buffers: SteeringBuffers, places: range) -> Iterator[None]:
    """Steer token i at the i-th of `places`."""
    count = len(places)
    try:
        buffers.index[:count] = torch.arange(1, count + 1, device=buffers.index.device)
        with _rows(buffers, places):
            yield
    finally:
        buffers.index[:count] = 0


@contextmanager
def _gated_canaries(
    buffers: SteeringBuffers, places: range, probe_sites: tuple[Site, ...], *, shut: bool
) -> Iterator[None]:
    """The same behind a gate each, read at the nearest probe site; the gates of a token are tried in turn."""
    gates, count = buffers.gates, len(places)
    assert gates is not None
    try:
        for token, place in enumerate(places):
            slot, site = token % gates.count, buffers.sites[place]
            gates.rows[token, slot] = token + 1
            gates.sites[token, slot] = max(gates.number(s) for s in probe_sites if site_order(s) <= site_order(site))
            # A hard gate of the probe in row 0, which is zero and so scores 0.
            gates.params[token, slot, :2] = torch.tensor([1.0, -NO_THRESHOLD if shut else NO_THRESHOLD])
        with _rows(buffers, places):
            yield
    finally:
        gates.slab[:count] = 0
        gates.values.zero_()
        gates.gains.zero_()


@contextmanager
def _rows(buffers: SteeringBuffers, places: range) -> Iterator[None]:
    """Row i + 1 holds a canary at the i-th of `places`."""
    count, width = len(places), buffers.table.shape[2]
    pattern = torch.where(torch.arange(width) % 3 == 0, _STRENGTH, -_STRENGTH / 4).to(buffers.table)
    try:
        for token, place in enumerate(places):
            buffers.table[place, token + 1] = pattern
            buffers.any_active[place] = True
        yield
    finally:
        buffers.any_active[places.start : places.stop] = False
        buffers.table[places.start : places.stop, 1 : count + 1] = 0


def _forward_v1(worker: Any) -> Callable[[int], Tensor]:
    runner = worker.model_runner

    def forward(tokens: int) -> Tensor:
        _clear_inputs(runner, runner.inputs_embeds.gpu)
        with _recorded(runner, "model") as results:
            # Without attention its result would be whatever the memory holds, which may drown a canary.
            last = runner._dummy_run(tokens, force_attention=True)[0]
        return _stream(results[-1] if results else last, tokens)

    return forward


def _forward_v2(worker: Any) -> Callable[[int], Tensor]:
    runner = worker.model_runner

    def forward(tokens: int) -> Tensor:
        _clear_inputs(runner, _embeddings_v2(runner, tokens))
        with _recorded(runner, "execute_model") as results:
            last = runner._dummy_run(tokens)[0]
        return _stream(results[-1] if last is None else last, tokens)

    return forward


def _clear_inputs(runner: Any, embeddings: Tensor | None) -> None:
    """Zero the buffers that a dummy run starts from: what an earlier pipeline stage would have sent, and `embeddings`.

    Layers that add in place have left the last run's stream there, canary and all: each run would begin where the one
    before it ended.
    """
    received = runner.intermediate_tensors
    inputs = [] if received is None else list(received.tensors.values())
    with torch.inference_mode():  # in which the runner may have made them
        for tensor in inputs if embeddings is None else [*inputs, embeddings]:
            tensor.zero_()


def _embeddings_v2(runner: Any, tokens: int) -> Tensor | None:
    """Where a dummy run takes embeddings from, if this model is given such in place of token ids."""
    given = getattr(runner, "uses_inputs_embeds", runner.supports_mm_inputs)  # newer versions have the first too
    found: Tensor | None = runner.model_state.dummy_inputs_embeds(tokens) if given and runner.is_first_pp_rank else None
    return found


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
