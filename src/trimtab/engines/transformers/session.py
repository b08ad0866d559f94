"""One steered call of `generate`: tells the runtime about each forward pass, and steers at the taps while it runs."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trimtab.engines.transformers.prompts import PromptBatch
from trimtab.gates import ResolvedGate
from trimtab.instrument.hookmap import HookMap
from trimtab.instrument.taps import Transform
from trimtab.ops import Emission, SteeringBuffers, emit, set_emission
from trimtab.program import ResolvedSteering
from trimtab.runtime import GateUse, SteeringRuntime, probes_needed, rows_needed
from trimtab.sites import Phase, Site

NOT_STEERED = ""  # the request id of padding


class SteeringSession:
    """Steers the forward passes of one batch. `steering[b]` belongs to row b of `batch`: all its beams or samples.

    `end_tokens` are the tokens after which a row's input is padding; empty where rows change places (beam search).
    `monitor` gates what decode tokens receive, from its site on.
    Buffers are made at the first forward pass, when the number of rows is known, and hold only the sites in use.
    """

    def __init__(
        self,
        hook_map: HookMap,
        batch: PromptBatch,
        steering: Sequence[ResolvedSteering | None],
        *,
        end_tokens: frozenset[int],
        dtype: torch.dtype,
        device: torch.device,
        monitor: ResolvedGate | None = None,
    ) -> None:
        self._map, self._batch, self._steering, self._end_tokens = hook_map, batch, steering, end_tokens
        self._dtype, self._device = dtype, device
        steered = [item for item in steering if item is not None]
        self._monitor = monitor if any(item.monitored for item in steered) else None
        read = () if self._monitor is None else (self._monitor.site,)
        used = {site for item in steered for site in (*item.sites, *(gate.site for gate in item.gates))}
        self._sites = sorted({*used, *read})
        self._gates = max((len(item.program(phase).gated) for item in steered for phase in Phase), default=0)
        self._holders = {site.layer: nn.Module() for site in self._sites}
        for layer, hook in read:
            set_emission(self._holders[layer], Emission(cross_layer=True, monitor_at=hook))
        self._runtime: SteeringRuntime | None = None
        self._capacity = (0, 0)  # rows, tokens
        self._planned: tuple[int, int] | None = None
        self._gate_uses: dict[tuple[int, str], GateUse] = {}  # by row and gate, of runtimes that grew out of use
        self._ended: npt.NDArray[np.int64] = np.empty(0, np.int64)  # column of each row's end token
        self.steps = 0

    @contextmanager
    def steering(self, decoder: nn.Module) -> Iterator[None]:
        """Steer every forward pass of `decoder`, the module that runs the layers, while the context lasts."""
        signature = inspect.signature(decoder.forward)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind(*args, **kwargs).arguments
            cache = given.get("past_key_values")
            cached = 0 if cache is None else int(cache.get_seq_length())
            ids = given.get("input_ids")
            rows, columns = (given["inputs_embeds"] if ids is None else ids).shape[:2]
            self._plan(rows, cached, columns, ids)

        handle = decoder.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with self._map.installed({site: self._transform(site) for site in self._sites}):
                yield
        finally:
            handle.remove()

    def gate_uses(self, output: int, outputs: int) -> tuple[GateUse, ...]:
        """What each gate did to one of the `outputs`: on its own row, or on all rows of its prompt if they differ."""
        self._keep_gate_uses()
        rows, per_prompt = self._capacity[0], outputs // len(self._steering)
        copies = rows // len(self._steering)
        prompt = output // per_prompt
        mine = [output] if rows == outputs else range(prompt * copies, (prompt + 1) * copies)
        found: dict[str, GateUse] = {}
        for (row, gate), use in self._gate_uses.items():
            if row in mine:
                found[gate] = found[gate] + use if gate in found else use
        return tuple(found[gate] for gate in sorted(found))

    def _keep_gate_uses(self) -> None:
        """Take over what the runtime has counted, once: its requests leave it."""
        for row in range(self._capacity[0] if self._runtime is not None and self._gates else 0):
            assert self._runtime is not None
            for use in self._runtime.gate_report(str(row)):
                known = self._gate_uses.get((row, use.gate))
                self._gate_uses[row, use.gate] = use if known is None else known + use
        self._runtime = None

    def _plan(self, rows: int, cached: int, columns: int, ids: torch.Tensor | None) -> None:
        """Route the tokens of one pass: each row is padding, then tokens, then what follows its end token."""
        self._ensure_capacity(rows, rows * columns)
        assert self._runtime is not None
        copies = rows // len(self._steering)  # beams or samples of one prompt lie side by side
        padding = np.repeat(self._batch.padding, copies)
        lengths = np.repeat(self._batch.lengths, copies)
        stop = np.clip(self._end_columns(rows, cached, columns, ids), cached, cached + columns)
        start = np.minimum(np.maximum(padding, cached), stop)
        counts = np.stack([start - cached, stop - start, cached + columns - stop], axis=1)
        names = [name for row in range(rows) for name in (NOT_STEERED, str(row), NOT_STEERED)]
        self._runtime.step(
            names,
            np.repeat(start - padding, 3),
            counts.reshape(-1),
            np.repeat(lengths, 3),
        )
        self._planned = (rows, columns)
        self.steps += 1

    def _end_columns(self, rows: int, cached: int, columns: int, ids: torch.Tensor | None) -> npt.NDArray[np.int64]:
        """For each row the column of its end token; beyond every column while it has none."""
        if len(self._ended) != rows:
            self._ended = np.full(rows, np.iinfo(np.int64).max)
        first_new = max(self._batch.width - cached, 0)  # end tokens inside a prompt end nothing
        if ids is None or not self._end_tokens or rows == 1 or first_new >= columns:
            return self._ended
        seen = np.isin(ids[:, first_new:].cpu().numpy(), list(self._end_tokens))
        column = np.where(seen.any(axis=1), cached + first_new + seen.argmax(axis=1), np.iinfo(np.int64).max)
        ended = np.minimum(self._ended, column)
        if columns == 1:  # several new tokens at once may be guesses that are taken back
            self._ended = ended
        return ended

    def _ensure_capacity(self, rows: int, tokens: int) -> None:
        if rows % len(self._steering):
            raise RuntimeError(f"{rows} rows in a forward pass over {len(self._steering)} prompts")
        if rows == self._capacity[0] and tokens <= self._capacity[1]:
            return
        if self._runtime is not None:
            self._keep_gate_uses()
            tokens = max(tokens, 2 * self._capacity[1])  # without a cache each pass is longer than the last
        buffers = SteeringBuffers(
            self._sites,
            hidden_size=self._map.sites.hidden_size,
            max_rows=rows_needed(rows, self._gates),
            max_tokens=tokens,
            dtype=self._dtype,
            device=self._device,
            gates=self._gates,
            max_probes=probes_needed(rows, self._gates),
        )
        for site in self._sites:
            buffers.attach(self._holders[site.layer], site)
        self._runtime = SteeringRuntime(buffers, max_requests=rows)
        if self._monitor is not None:
            self._runtime.set_monitor(self._monitor)
        copies = rows // len(self._steering)
        for row in range(rows):
            self._runtime.admit(str(row), self._steering[row // copies])
        self._capacity = (rows, tokens)

    def _transform(self, site: Site) -> Transform:
        holder = self._holders[site.layer]

        def steer(value: torch.Tensor) -> torch.Tensor:
            tokens = value.numel() // value.shape[-1]
            if self._planned is None or tokens != self._planned[0] * self._planned[1]:
                raise RuntimeError(f"{site} saw {tokens} tokens, but the pass was planned for {self._planned}")
            return emit(holder, site.hook, value)

        return steer
