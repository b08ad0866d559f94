"""Random gates on random tokens, and their meaning in float64: what the tests of `apply_gates_` share."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.ops import SteeringBuffers
from trimtab.ops.gate_buffers import gate_op_args
from trimtab.sites import HookPoint, Site

SITES = tuple(Site(layer, HookPoint.POST_BLOCK) for layer in range(3))


@dataclass
class Stack:
    """Three sites of one engine, each on a module of its own, with random rows, probes and token records."""

    buffers: SteeringBuffers
    modules: list[nn.Module]
    tokens: int

    def args(self, place: int, steered: Tensor, hidden: Tensor, rest: Tensor | None = None):
        return gate_op_args(self.modules[place], HookPoint.POST_BLOCK, steered, hidden, rest)


def gated_stack(
    tokens, width, *, gates=2, dtype=torch.float32, seed=0, device="cpu", rows=5, probes=4, probe_sites=None
) -> Stack:
    """A third of the gates are none, a third hard, half inverted; probes stand at any of the three sites. Half of those
    that can be are joined to the gate before them."""
    rng = np.random.default_rng(seed)
    buffers = SteeringBuffers(
        SITES,
        hidden_size=width,
        max_rows=rows,
        max_tokens=tokens + 3,
        dtype=dtype,
        gates=gates,
        max_probes=probes,
        probe_sites=probe_sites,
    )
    state = buffers.gates
    buffers.table[:, 1:] = torch.from_numpy(rng.standard_normal((len(SITES), rows - 1, width))).to(dtype)
    state.probe_table[1:] = torch.from_numpy(rng.standard_normal((probes - 1, width)).astype(np.float32)) / width**0.5
    shape = (tokens, gates)
    on = rng.random(shape) > 1 / 3
    state.rows[:tokens] = torch.from_numpy(np.where(on, rng.integers(1, rows, shape), 0))
    state.probes[:tokens] = torch.from_numpy(np.where(on, rng.integers(1, probes, shape), 0).astype(np.int32))
    state.sites[:tokens] = torch.from_numpy(np.where(on, rng.integers(1, 4, shape), 0).astype(np.int32))
    params = np.stack(
        [
            rng.uniform(-2, 2, shape),
            rng.uniform(-1, 1, shape),
            np.where(rng.random(shape) < 1 / 3, 0.0, rng.uniform(0.1, 5, shape)),
            rng.integers(0, 2, shape),
        ],
        axis=-1,
    )
    joins = rng.choice([0.0, 0.0, 1.0, -1.0], (*shape, 1))
    numbers = np.concatenate([params, joins], axis=-1).astype(np.float32)
    state.params[:tokens] = torch.from_numpy(numbers) * torch.from_numpy(on)[..., None]
    unjoined(state)
    modules = [nn.Module() for _ in SITES]
    for module, site in zip(modules, SITES, strict=True):
        buffers.attach(module, site)
    stack = Stack(buffers, modules, tokens)
    return stack if device == "cpu" else moved(stack, device, probe_sites)


def unjoined(state) -> None:
    """A gate is joined only to one that is decided at its own site or an earlier one."""
    before, own = state.sites[:, :-1], state.sites[:, 1:]
    state.params[:, 0, 4] = 0.0
    state.params[:, 1:, 4] *= (before > 0) & (before <= own)


def moved(stack: Stack, device, probe_sites=None) -> Stack:
    """The same on another device."""
    old = stack.buffers
    new = SteeringBuffers(
        SITES,
        hidden_size=old.table.shape[2],
        max_rows=old.table.shape[1],
        max_tokens=len(old.token_slab),
        dtype=old.table.dtype,
        device=device,
        gates=old.gates.count,
        max_probes=len(old.gates.probe_table),
        probe_sites=probe_sites,
    )
    new.table.copy_(old.table)
    new.gates.slab.copy_(old.gates.slab)
    new.gates.probe_table.copy_(old.gates.probe_table)
    modules = [nn.Module() for _ in SITES]
    for module, site in zip(modules, SITES, strict=True):
        new.attach(module, site)
    return Stack(new, modules, stack.tokens)


class Oracle:
    """One forward pass in float64 by the formula of the contract; factors are kept from site to site."""

    def __init__(self, stack: Stack) -> None:
        self.table = stack.buffers.table.double().cpu().numpy()
        state = stack.buffers.gates
        self.rows, self.probes, self.sites = (t.cpu().numpy().copy() for t in (state.rows, state.probes, state.sites))
        self.params = state.params.double().cpu().numpy()
        self.directions = state.probe_table.double().cpu().numpy()
        self.factors: dict[tuple[int, int], float] = {}
        self.owns: dict[tuple[int, int], float] = {}  # of joined gates, by themselves
        self.near: set[int] = set()  # tokens with a score so near a hard threshold that float32 may decide otherwise

    def added(self, place: int, stream: np.ndarray) -> np.ndarray:
        """What is added at the site, [N, H]; `stream` is float64."""
        out = np.zeros_like(stream)
        for token in range(len(stream)):
            for slot in range(self.rows.shape[1]):
                site = self.sites[token, slot]
                coefficient, threshold, sharpness, invert, join = self.params[token, slot]
                if site == place + 1:
                    score = float(stream[token] @ self.directions[self.probes[token, slot]])
                    if sharpness == 0:
                        y = float(score > threshold)
                        if abs(score - threshold) < 1e-4 * (1 + np.abs(stream[token]).sum()):
                            self.near.add(token)
                    else:
                        y = 1 / (1 + np.exp(-np.clip(sharpness * (score - threshold), -700, 700)))
                    factor = 1 - y if invert else y
                    if join:
                        self.owns[token, slot], before = factor, self.factors[token, slot - 1]
                        factor = factor * before if join > 0 else 1 - (1 - factor) * (1 - before)
                    self.factors[token, slot] = factor
                if 0 < site <= place + 1:
                    factor = self.factors[token, slot]
                    out[token] += self.table[place, self.rows[token, slot]] * coefficient * factor
        return out
