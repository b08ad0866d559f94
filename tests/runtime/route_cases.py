"""Random schedules for `route`: after each pass the records of all tokens, held to a slow and obvious model."""

from collections.abc import Callable

import numpy as np
import torch
from spans_model import Engine, Life, due, new_text, random_spans

from trimtab.ops.args import RouteOpArgs
from trimtab.ops.route import route_args
from trimtab.ops.span_buffers import SpanBuffers
from trimtab.runtime.span_lines import ring_after, span_line

MOST, TOKENS = 4, 2048
PLACEHOLDER = 77


class Device:
    """The tables of a few requests, written here without an uploader; each token record names its program."""

    def __init__(self, rng: np.random.Generator, gate_words: int, kinds: torch.dtype) -> None:
        self._rng, self._kinds = rng, kinds
        self.buffers = SpanBuffers(MOST, max_tokens=TOKENS, gate_bytes=8 * gate_words)
        self.words = torch.zeros(TOKENS, 8, dtype=torch.int64)
        self.gates = torch.zeros(TOKENS, gate_words, dtype=torch.int64)
        self._free = list(range(MOST, 0, -1))
        self.slots: dict[str, int] = {}
        self._made = 0

    def new(self) -> Life:
        rng = self._rng
        prompt = int(rng.integers(1, 20) if rng.random() < 0.8 else rng.integers(60, 300))
        spans = random_spans(rng, prompt) if rng.random() < 0.8 else None
        self._made += 1
        return Life(f"request {self._made}", prompt, new_text(rng, prompt, spans), spans)

    def join(self, life: Life, upto: int) -> None:
        if life.spans is None:
            return
        slot = self.slots[life.name] = self._free.pop()
        line = span_line(self.buffers.record, life.spans, self.records(slot))
        line["gates"][0] = np.arange(self.gates.shape[1]) + 1000 * self.records(slot)[:, :1]
        self.buffers.slab[slot] = torch.from_numpy(line.view(np.uint8).reshape(-1).copy())
        self.buffers.rings[slot].copy_(torch.from_numpy(ring_after(life.spans, life.text, upto)))

    def leave(self, life: Life) -> None:
        if life.spans is not None:
            self._free.append(self.slots.pop(life.name))

    def records(self, slot: int) -> np.ndarray:
        """Of each program of a line, which numbers are its own: [32, 8], or as many as a request has."""
        words = 10_000 * slot + 100 * np.arange(32)[:, None] + np.arange(8)
        return np.asarray(words, np.int64)


def run(
    seed: int, passes: int, decide: Callable[[RouteOpArgs, int], None], kinds: torch.dtype = torch.int32
) -> tuple[int, int]:
    """Tokens that were decided, and by atoms. Raises AssertionError at the first record that is not what is due."""
    rng = np.random.default_rng(seed)
    device = Device(rng, gate_words=int(rng.integers(0, 3)), kinds=kinds)
    engine = Engine(rng, device.new, device.join, device.leave, MOST)
    decided = by_atoms = 0
    for parts in engine.passes(passes):
        owners: list[tuple[Life, int, list[int]]] = []
        for part in parts:
            text = part.text()
            owners += [(part.life, position, text) for position in range(part.first, len(text))]
        count = len(owners)
        positions = torch.full((count + 9,), -5, dtype=kinds)
        ids = torch.full((count + 9,), -1, dtype=kinds)
        device.words.fill_(PLACEHOLDER)
        device.gates.fill_(PLACEHOLDER)
        device.buffers.decided.fill_(-1)
        device.words[:, 1] = 0
        for place, (life, position, text) in enumerate(owners):
            positions[place], ids[place] = position, text[position]
            device.words[place, 1] = device.slots.get(life.name, 0)
        device.words[count:, 1] = int(rng.integers(1, MOST + 1))  # behind the pass: never to be looked at
        want_words, want_gates = device.words.clone(), device.gates.clone()
        want_decided = device.buffers.decided.clone()
        for place, (life, position, text) in enumerate(owners):
            if life.spans is not None:
                slot = device.slots[life.name]
                program = due(life.spans, text, position)
                want_decided[place] = program
                record = torch.from_numpy(device.records(slot)[program])
                want_words[place, [0, 2, 4, 6]] = record[[0, 2, 4, 6]]
                want_gates[place] = torch.arange(device.gates.shape[1]) + 1000 * record[0]
                decided += 1
                by_atoms += len(life.spans.programs_at(position)) > 1
        decide(route_args(device.buffers, device.words, device.gates, positions, ids), count)
        assert torch.equal(device.buffers.decided, want_decided)
        assert torch.equal(device.words, want_words)
        assert torch.equal(device.gates, want_gates)
    return decided, by_atoms
