"""What slots must do, said the slow way in float64, and what the device's records make of it by the contract's formula.

The two share nothing: the first knows vectors and what was asked of them, the second only what the device holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from runtime_model import HIDDEN, SITES, vector

from trimtab.ops import SteeringBuffers
from trimtab.ops.args import SlotForm
from trimtab.program import Direction, Numbers, PhaseProgram, ResolvedSteering, Slot, Term
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.slots import Part
from trimtab.responses import CLIP
from trimtab.sites import Site
from trimtab.vectors.vector import SteeringVector

FORM = SlotForm(3, (CLIP.name,), True)
VECTORS = [vector(40 + seed) for seed in range(4)]
TILTED = [VECTORS[0] + 0.5 * VECTORS[1], VECTORS[1] - 0.7 * VECTORS[2]]  # they overlap with the others


@dataclass(frozen=True)
class Ask:
    """One slot as a user would say it: hold the projection on `along` between two bounds; or give it to another."""

    along: SteeringVector
    strength: float = 1.0
    low: float = 0.0
    high: float = 0.0
    to: SteeringVector | None = None
    sites: tuple[Site, ...] = SITES
    gate: ResolvedGate | None = None

    @property
    def slot(self) -> Slot:
        strength, parts = (self.strength, None) if self.to is None else (-1.0, (Part(self.to), Part(self.along, -1.0)))
        numbers = tuple((site, Numbers.of(0.0, strength, self.low, self.high)) for site in self.sites)
        write = None if parts is None else Direction(parts)
        return Slot(CLIP.name, Direction((Part(self.along),)), write, numbers, self.gate)

    def unit(self, site: Site, of: SteeringVector | None = None) -> np.ndarray:
        row = (of or self.along).directions[site].astype(np.float64)
        return row / np.sqrt((row * row).sum())

    def number(self, y: np.ndarray, site: Site) -> float:
        u = float(y @ self.unit(site))
        return u if self.to is not None else self.strength * (min(max(u, self.low), self.high) - u)


Asked = Sequence[Ask]


def steering(prefill: Asked, decode: Asked | None = None, terms: Sequence[tuple[SteeringVector, float]] = ()):
    """Both phases, or the same in both."""
    added = [Term(one, scale) for one, scale in terms]
    phases = prefill, prefill if decode is None else decode
    return ResolvedSteering(tuple(PhaseProgram.of(added, [ask.slot for ask in asked]) for asked in phases))


def due(y: np.ndarray, asked: Asked, site: Site, factors: dict[bytes, float] | None = None) -> np.ndarray:
    """z for a stream `y` [H]: the shortest step along the directions of the set that takes each projection where it was
    asked to, and what is given to other directions on top."""
    here = [ask for ask in asked if site in ask.sites]
    numbers = [a.number(y, site) * (1.0 if a.gate is None else (factors or {})[a.gate.digest]) for a in here]
    z = y.copy()
    held = [(ask, c) for ask, c in zip(here, numbers, strict=True) if ask.to is None and ask.strength]
    if held:
        directions = np.stack([ask.unit(site) for ask, _ in held])
        z += np.linalg.lstsq(directions, np.array([c for _, c in held]), rcond=None)[0]
    for ask, c in zip(here, numbers, strict=True):
        if ask.to is not None:
            z += c * (ask.unit(site, ask.to) - ask.unit(site))
    return z


def done(buffers: SteeringBuffers, y: np.ndarray, token: int, site: Site, factors: Sequence[float] = ()) -> np.ndarray:
    """The same by what the device holds for `token`: the formula of `SlotOpArgs`, one number after the other."""
    assert buffers.slots is not None
    at, table = buffers.slots.sites.index(site), buffers.table[buffers.sites.index(site)].double().numpy()
    row = int(buffers.index[token])
    rows, codes, params, mix = (
        getattr(buffers.slots, name)[at, row].double().numpy() for name in ("rows", "codes", "params", "mix")
    )
    count = len(rows)
    numbers = np.zeros(count)
    for k in range(count):
        read, (_, lane) = int(rows[k, 0]), codes[k]
        factor, bias, strength, low, high = params[k, :5]
        u = (y @ table[read] * factor if read else 0.0) + bias
        numbers[k] = strength * (min(max(u, low), high) - u) * (factors[int(lane) - 1] if lane else 1.0)
    z = y.copy()
    for k in range(count):
        z += mix[k] @ numbers * table[int(rows[k, 1] or rows[k, 0])]
    return z


def make_slot_buffers(max_rows=12, *, sites=SITES, form=FORM, dtype=torch.float32, slot_sites=None, **more):
    made = {"slots": form, "slot_sites": slot_sites, **more}
    return SteeringBuffers(sites, hidden_size=HIDDEN, max_rows=max_rows, max_tokens=32, dtype=dtype, **made)
