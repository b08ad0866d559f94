"""One steered call of `generate`: tells the runtime about each forward pass, and steers at the taps while it runs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from trimtab.engines.transformers.groups import Places, SiteGroup, slot_form
from trimtab.engines.transformers.pass_tokens import PassTokens
from trimtab.engines.transformers.progress import Progress
from trimtab.engines.transformers.prompts import PromptBatch
from trimtab.errors import SteeringError
from trimtab.instrument.hookmap import HookMap
from trimtab.instrument.taps import Transform
from trimtab.program import ResolvedSteering
from trimtab.program.counting import SlotUse, summed
from trimtab.runtime import GateUse
from trimtab.sites import Site

NOT_STEERED = ""  # the request id of padding


class SteeringSession:
    """Steers the forward passes of one batch. `steering[b]` belongs to row b of `batch`: all its beams or samples.

    `progress` says which columns a pass brings; `tokens` says which ids, where they decide what is done. `homes` says
    where each layer lives, and so where the buffers of its sites do. What a gate decides at one site acts at others, so
    a call with gates keeps all its buffers where its first site is.
    """

    def __init__(
        self,
        hook_map: HookMap,
        batch: PromptBatch,
        steering: Sequence[ResolvedSteering | None],
        progress: Progress,
        tokens: PassTokens | None = None,
        *,
        dtype: torch.dtype,
        homes: Mapping[int, torch.device],
    ) -> None:
        self._map, self._progress, self._tokens, self._prompts = hook_map, progress, tokens, len(steering)
        copies = progress.rows // len(steering)  # beams or samples of one prompt lie side by side
        self._steering = [item for item in steering for _ in range(copies)]
        self._padding = progress.padding
        self._lengths = np.repeat(np.repeat(batch.lengths, copies), 3)
        steered = [item for item in steering if item is not None]
        read = {one.site for item in steered for gate in item.gates for one in gate.members}
        self._sites = sorted(read.union(site for item in steered for site in item.sites))
        gates = max((program.lane_count for item in steered for program in item.programs), default=0)
        places: dict[torch.device, list[Site]] = {}
        for site in self._sites:
            first = self._sites[0] if gates else site
            places.setdefault(homes[first.layer], []).append(site)
        width, slots = hook_map.sites.hidden_size, slot_form(steered)
        self._groups = [
            SiteGroup(sites, device, dtype=dtype, hidden_size=width, gates=gates, slots=slots)
            for device, sites in places.items()
        ]
        self._names = [name for row in range(progress.rows) for name in (NOT_STEERED, str(row), NOT_STEERED)]
        self._has_spans = any(item.spans is not None for item in steered)
        self._room = 0  # tokens that the buffers hold
        self._planned: int | None = None  # tokens of the pass under way
        self._reached: Counter[Site] = Counter()  # how often each site was steered in it

    @contextmanager
    def steering(self) -> Iterator[None]:
        """Steer every forward pass that `begin` announces while the context lasts.

        Raises SteeringError where a pass has left a site out, or came through it twice.
        """
        transforms = {site: self._transform(group, site) for group in self._groups for site in group.sites}
        with self._map.installed(transforms):
            yield
        self._check_reached()

    def begin(self, start: int, columns: int) -> None:
        """Route the tokens of the pass over `columns` from `start` on.

        Each row is padding, then tokens, then its end token and the padding that follows it.
        """
        self._check_reached()
        rows, end = self._progress.rows, start + columns
        if rows * columns > self._room:
            self._room = max(rows * columns, 2 * self._room)  # without a cache each pass is longer than the last
            for group in self._groups:
                group.prepare(self._steering, self._room)
        stop = np.clip(self._progress.ended, start, end)
        first = np.minimum(np.maximum(self._padding, start), stop)
        counts = np.stack([first - start, stop - first, end - stop], axis=1).reshape(-1)
        places = self._places(start, columns) if self._has_spans else None
        for group in self._groups:
            group.step(self._names, np.repeat(first - self._padding, 3), counts, self._lengths, places)
        self._planned = rows * columns
        self._reached.clear()

    def gate_uses(self, output: int, outputs: int) -> tuple[GateUse, ...]:
        """What each gate did to one of the `outputs`: on its own row, or on all rows of its prompt if they differ."""
        mine = self._rows_of(output, outputs)
        return tuple(summed(use for group in self._groups for row, use in group.gate_uses() if row in mine))

    def slot_uses(self, output: int, outputs: int) -> list[SlotUse]:
        """What slots did to it, counted as of gates."""
        mine = self._rows_of(output, outputs)
        return [use for group in self._groups for row, use in group.slot_uses() if row in mine]

    def _places(self, start: int, columns: int) -> Places:
        """The position and the id of each token of the pass. Where rows change places, or tokens are taken back, the
        tokens before those of an answer are told anew."""
        where = np.arange(start, start + columns) - self._padding[:, None]
        if self._tokens is None:
            return Places(torch.from_numpy(where.reshape(-1)))
        ids = self._tokens.take(*where.shape).reshape(-1)
        before = self._tokens.before(start) if self._tokens.rewinds and start >= self._progress.width else None
        if before is not None:
            before = [row[padding:] for row, padding in zip(before, self._padding.tolist(), strict=True)]
        return Places(torch.from_numpy(where.reshape(-1)), ids, before)

    def _rows_of(self, output: int, outputs: int) -> Sequence[int]:
        rows, per_prompt = self._progress.rows, outputs // self._prompts
        copies, prompt = rows // self._prompts, output // per_prompt
        return [output] if rows == outputs else range(prompt * copies, (prompt + 1) * copies)

    def _check_reached(self) -> None:
        """Each site must have been steered once in the pass that is over: receipts must not say more than was done."""
        if self._planned is None:
            return
        for site in self._sites:
            if (times := self._reached[site]) != 1:
                raise SteeringError(
                    str(site), f"was run {times} times in one forward pass; it can be steered only once"
                )

    def _transform(self, group: SiteGroup, site: Site) -> Transform:
        def steer(value: torch.Tensor) -> torch.Tensor:
            tokens = value.numel() // value.shape[-1]
            if tokens != self._planned:
                raise SteeringError(str(site), f"saw {tokens} tokens in a forward pass over {self._planned}")
            self._reached[site] += 1
            return group.steer(site, value)

        return steer
