"""Requests whose vectors and scales are of any magnitude, and what each token must receive: by float64 NumPy alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.ops import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import ResolvedGate, probes_needed, rows_needed
from trimtab.runtime import SteeringRuntime
from trimtab.sites import HookPoint, Site
from trimtab.vectors import SteeringVector

SITES = (Site(0, HookPoint.POST_BLOCK), Site(1, HookPoint.POST_BLOCK))
WIDTH, GATES = 16, 2

# Half a unit in the last place of the table's dtype; and half of the smallest step that float16 has, in a row whose
# largest number is at least 32752. The last factor is float32 arithmetic: two products, a sigmoid and a sum.
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LOST_BELOW = {torch.float32: 0.0, torch.float16: 2.0**-25 / 32752, torch.bfloat16: 0.0}
ARITHMETIC = 2.0**-20


@dataclass(frozen=True)
class Ask:
    """One vector at all sites [S, H], its scale, and the threshold of a gate on a score of 0, if it has one."""

    numbers: np.ndarray
    scale: float
    threshold: float | None = None


def numbers(rng: np.random.Generator, largest: float, spread: float) -> np.ndarray:
    """Random numbers [S, H] in float32 down to 10**-spread of `largest`, which is one of them."""
    exponents = rng.uniform(-spread, 0.0, (len(SITES), WIDTH))
    block = rng.choice([-1.0, 1.0], exponents.shape) * largest * 10.0**exponents
    block[rng.integers(len(SITES)), rng.integers(WIDTH)] = largest
    return block.astype(np.float32)


def gate(threshold: float) -> ResolvedGate:
    """A gate that reads a probe at the first site."""
    probe = SteeringVector({SITES[0]: np.linspace(-1.0, 1.0, WIDTH, dtype=np.float32)})
    return ResolvedGate.of(probe, threshold, 1.0)


def program(asked: list[Ask]) -> PhaseProgram:
    return PhaseProgram.of(
        Term(
            SteeringVector(dict(zip(SITES, ask.numbers, strict=True))),
            ask.scale,
            gate=None if ask.threshold is None else gate(ask.threshold),
        )
        for ask in asked
    )


def due(asked: list[Ask], dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What a token must receive, and how far from it the device may be: float64 [S, H] each."""
    total, slack = np.zeros((len(SITES), WIDTH)), np.zeros((len(SITES), WIDTH))
    for threshold in {ask.threshold for ask in asked}:
        factor = 1.0 if threshold is None else 1.0 / (1.0 + np.exp(threshold))
        parts = [np.float64(ask.scale) * ask.numbers.astype(np.float64) for ask in asked if ask.threshold == threshold]
        row = factor * np.sum(parts, axis=0)
        slack += (HALF_STEP[dtype] + ARITHMETIC) * abs(row) + LOST_BELOW[dtype] * abs(row).max()
        slack += 2.0**-48 * factor * np.sum(np.abs(parts), axis=0)  # where terms cancel: sums are taken in float64
        total += row
    return total, slack + 2.0**-22 * abs(total)


class Engine:
    """Two layers that do nothing, steered by a runtime: one decode token of each request."""

    def __init__(self, requests: list[list[Ask]], dtype: torch.dtype, device: str = "cpu") -> None:
        count = len(requests)
        self.buffers = SteeringBuffers(
            SITES,
            hidden_size=WIDTH,
            max_rows=rows_needed(count, GATES),
            max_tokens=count,
            dtype=dtype,
            device=device,
            gates=GATES,
            max_probes=probes_needed(count, GATES),
        )
        self.layers = [nn.Module() for _ in SITES]
        for layer, site in zip(self.layers, SITES, strict=True):
            self.buffers.attach(layer, site)
        self.runtime = SteeringRuntime(self.buffers, max_requests=count)
        names = [f"r{number}" for number in range(count)]
        for name, asked in zip(names, requests, strict=True):
            one = program(asked)
            self.runtime.admit(name, ResolvedSteering((one, one)))
        self.runtime.step(names, np.full(count, 5), np.ones(count, int), np.full(count, 3))

    @property
    def stream(self) -> Tensor:
        """Zeros in float32, so that what is added shows every digit that the table kept."""
        return torch.zeros(self.buffers.token_slab.shape[0], WIDTH, device=self.buffers.table.device)


def check(received: list[Tensor], requests: list[list[Ask]], dtype: torch.dtype) -> None:
    """`received` is what each site added, [N, H] each."""
    for token, asked in enumerate(requests):
        want, slack = due(asked, dtype)
        for place, added in enumerate(received):
            wrong = np.abs(added[token].double().cpu().numpy() - want[place]) > slack[place]
            assert not wrong.any(), (asked, place, added[token][wrong.tolist()], want[place][wrong])


def assorted(seed: int, count: int = 24) -> list[list[Ask]]:
    """Requests of one to three terms, gated or not, over all magnitudes that can be asked for."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        asked = []
        for _ in range(rng.integers(1, 4)):
            largest = 10.0 ** rng.uniform(-30, 30)
            added = 10.0 ** rng.uniform(-6, 4)
            threshold = (None, 0.5, -2.0)[rng.integers(3)]
            asked.append(Ask(numbers(rng, largest, rng.uniform(0, 9)), float(added / largest), threshold))
        requests.append(asked)
    return requests
