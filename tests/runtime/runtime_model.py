"""A slow and obvious model of steering, and small builders: what the runtime's tests compare against.

It keeps what each request asked for as plain lists and answers, token by token, which sum of vectors is due. It shares
nothing with the runtime, and does not use `PhaseProgram.row`.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from trimtab.ops.buffers import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector

HIDDEN = 8
SITES = (Site(0, HookPoint.POST_BLOCK), Site(1, HookPoint.PRE_ATTN), Site(1, HookPoint.POST_BLOCK))

Asked = list[tuple[SteeringVector, float]]  # one phase of a request, as the user would say it


@dataclass
class Request:
    """A request as a user and a scheduler see it."""

    name: str
    prefill: Asked
    decode: Asked
    prompt: int
    computed: int = 0  # tokens whose KV exists
    length: int = 0  # prompt and sampled tokens
    running: bool = False
    steering: ResolvedSteering = field(init=False)

    def __post_init__(self) -> None:
        self.length = self.length or self.prompt
        self.steering = resolved(self.prefill, self.decode)

    def due(self, position: int) -> np.ndarray:
        """The sum that the token at `position` must receive: float64 [S, H]."""
        total = np.zeros((len(SITES), HIDDEN))
        for vector, scale in self.prefill if position < self.prompt else self.decode:
            for row, site in enumerate(SITES):
                if site in vector.directions:
                    total[row] += np.float64(scale) * vector.directions[site].astype(np.float64)
        return total


def resolved(prefill: Asked, decode: Asked) -> ResolvedSteering:
    programs = [PhaseProgram.of([Term(vector, scale) for vector, scale in asked]) for asked in (prefill, decode)]
    return ResolvedSteering(tuple(programs))


def vector(seed: int, sites: tuple[Site, ...] = SITES, hidden: int = HIDDEN) -> SteeringVector:
    numbers = np.random.default_rng(seed).standard_normal((len(sites), hidden)).astype(np.float32)
    return SteeringVector(dict(zip(sites, numbers, strict=True)))


def unit(of: SteeringVector) -> float:
    """The power of two in which a vector of ordinary numbers is stored: its largest lies between 32768 and 65504."""
    largest = float(np.abs(of.block).max())
    return next(2.0**power for power in range(-64, 64) if 32752 <= largest / 2.0**power <= 65504)


def make_buffers(max_requests=4, *, max_tokens=64, sites=SITES, hidden=HIDDEN, dtype=torch.float32, device="cpu"):
    return SteeringBuffers(
        sites,
        hidden_size=hidden,
        max_rows=1 + 2 * max_requests,
        max_tokens=max_tokens,
        dtype=dtype,
        device=torch.device(device),
    )


def received(buffers: SteeringBuffers) -> np.ndarray:
    """What the operator would add to each token of the buffers: float64 [T, S, H], by the formula of its contract."""
    rows = buffers.table.double().numpy()[:, buffers.index.numpy()]
    factors = buffers.scales.double().numpy()[buffers.index.numpy()] * buffers.row_gate.double().numpy()
    return np.moveaxis(rows * factors[None, :, None], 1, 0)


def snapshot(buffers: SteeringBuffers) -> list[bytes]:
    """Every byte that the runtime may write."""
    return [t.view(torch.uint8).contiguous().numpy().tobytes() for t in written(buffers)]


def written(buffers: SteeringBuffers) -> tuple[torch.Tensor, ...]:
    return buffers.table, buffers.any_active, buffers.token_slab


def poison(buffers: SteeringBuffers) -> list[bytes]:
    """Overwrite all of it behind the runtime's back: whatever differs from this afterwards, the runtime wrote."""
    for tensor in written(buffers):
        tensor.view(torch.uint8).fill_(0x5A)  # also a wrong row, a wrong gate and a wrong mask
    return snapshot(buffers)
