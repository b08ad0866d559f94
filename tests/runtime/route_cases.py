"""Random schedules for `route`: after each pass the records of all tokens, held to a slow and obvious model."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from spans_model import Engine, Life, due, new_text, random_spans

from trimtab.ops.args import RouteOpArgs
from trimtab.ops.route import route_args
from trimtab.ops.span_buffers import SpanBuffers, gate_threshold
from trimtab.program import spans as said
from trimtab.program.spans import Between, IdSet, Spans
from trimtab.runtime.span_lines import ring_after, span_line
from trimtab.sites import Phase

MOST, TOKENS = 4, 2048
PLACEHOLDER = 77

Numbers = tuple[float, float, float]  # of a schedule
Decide = Callable[[RouteOpArgs, int], None]


class Device:
    """The tables of a few requests, written here without an uploader; each token record names its program."""

    def __init__(self, rng: np.random.Generator, gates: int = 0) -> None:
        self._rng = rng
        self.buffers = SpanBuffers(MOST, max_tokens=TOKENS, gates=gates)
        self.words = torch.zeros(TOKENS, 8, dtype=torch.int64)
        self.gates = torch.zeros(TOKENS, self.buffers.gates.shape[2], dtype=torch.int64)
        self.schedules: dict[int, list[list[Numbers | None]]] = {}
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
        lanes = self.buffers.schedules.shape[2]
        some = self._rng.random() < 0.5
        self.schedules[slot] = [
            [self.schedule() if some and phase is Phase.DECODE else None for _ in range(lanes)]
            for phase in life.spans.phases
        ]
        line = span_line(self.buffers.record, life.spans, self.records(slot), self.schedules[slot])
        line["gates"][0] = self.gate_words(slot)
        self.buffers.slab[slot] = torch.from_numpy(line.view(np.uint8).reshape(-1).copy())
        self.buffers.rings[slot].copy_(torch.from_numpy(ring_after(life.spans, life.text, upto)))

    def leave(self, life: Life) -> None:
        if life.spans is not None:
            self._free.append(self.slots.pop(life.name))

    def schedule(self) -> Numbers | None:
        """Decays and ramps, some of them both, long and short; or none."""
        rng = self._rng
        ramp = (1.0 - float(rng.integers(0, 9)), float(rng.integers(1, 40))) if rng.random() < 0.6 else (1.0, 1.0)
        return (-float(np.float32(rng.choice([0.0, 0.03, 0.5, 30.0]))), *ramp) if rng.random() < 0.5 else None

    def records(self, slot: int) -> np.ndarray:
        """Of each program of a line its token record, [32, 8]: all numbers are its own."""
        words = 10_000 * slot + 100 * np.arange(32)[:, None] + np.arange(8)
        words = np.asarray(words, np.int64)
        words.view(np.float32)[:, 4] = words[:, 0]
        return words

    def gate_words(self, slot: int) -> np.ndarray:
        """Of each its gate record, likewise."""
        return np.arange(self.gates.shape[1]) + 1000 * self.records(slot)[:, :1]

    def scheduled(self, slot: int, program: int, place: int) -> Iterator[tuple[int, float]]:
        """Each schedule of a program that there is, 0 for that of its row, and its factor."""
        for lane, schedule in enumerate(self.schedules[slot][program]):
            if schedule is not None:
                rate, offset, length = schedule
                yield lane, 2.0 ** (rate * place) * min(max((place + offset) / length, 0.0), 1.0)


def run(seed: int, passes: int, decide: Decide, kinds: torch.dtype = torch.int32) -> tuple[int, ...]:
    """Tokens that were decided, and by atoms; rows and gates that followed schedules. Raises AssertionError at the
    first record that is not what is due."""
    rng = np.random.default_rng(seed)
    device = Device(rng, gates=int(rng.integers(0, 3)))
    engine = Engine(rng, device.new, device.join, device.leave, MOST)
    decided, by_atoms, seen = 0, 0, [0, 0]
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
        factors: dict[tuple[int, int], float] = {}
        for place, (life, position, text) in enumerate(owners):
            if life.spans is not None:
                slot = device.slots[life.name]
                program = due(life.spans, text, position)
                want_decided[place] = program
                record = torch.from_numpy(device.records(slot)[program])
                want_words[place, [0, 2, 4, 6]] = record[[0, 2, 4, 6]]
                want_gates[place] = torch.from_numpy(device.gate_words(slot)[program])
                for lane, factor in device.scheduled(slot, program, position - life.prompt):
                    factors[place, lane] = factor
                decided += 1
                by_atoms += len(life.spans.programs_at(position)) > 1
        decide(route_args(device.buffers, device.words, device.gates, positions, ids), count)
        assert torch.equal(device.buffers.decided, want_decided)
        for (place, lane), factor in factors.items():
            want, found = (want_words, device.words) if lane == 0 else (want_gates, device.gates)
            at = 4 if lane == 0 else gate_threshold(device.buffers.schedules.shape[2] - 1, lane - 1)
            numbers = found.view(torch.float32)
            told = float(numbers[place, at])
            whole = float(want.view(torch.float32)[place, at]) if lane == 0 else 1.0
            with np.errstate(over="ignore"):
                does = told if lane == 0 else 1.0 / (1.0 + np.exp(np.float64(told)))
            np.testing.assert_allclose(does, whole * factor, rtol=2e-5, atol=1e-30)
            want.view(torch.float32)[place, at] = numbers[place, at]
            seen[lane > 0] += 1
        assert torch.equal(device.words, want_words)
        assert torch.equal(device.gates, want_gates)
    return decided, by_atoms, *seen


def alone(spans: Spans, text: list[int], first: int, upto: int, decide: Decide) -> list[int]:
    """The programs of a request's tokens from `first` to `upto`, in one pass; what came before them is told."""
    device = Device(np.random.default_rng(0))
    life = Life("a", spans.prompt_length, text, spans)
    device.join(life, first)
    count = upto - first
    device.words[:count, 1] = device.slots["a"]
    positions, ids = torch.arange(first, upto), torch.tensor(text[first:upto])
    decide(route_args(device.buffers, device.words, device.gates, positions, ids), count)
    return device.buffers.decided[:count].tolist()


def widest(prompt: int) -> Spans:
    """As many of everything as a request can have."""
    starts = (0, *range(prompt, prompt + said.MOST_RUNS - 1))
    sequences = tuple(tuple(range(length, 0, -1)) for length in (1, 2, 15, 16))
    atoms = (
        Between(sequences, tuple((100 + each,) * 16 for each in range(4))),
        IdSet(tuple((3 * low, 3 * low + 2) for low in range(64))),
        Between((), sequences[3:], is_open=True, looks_back=True),
        IdSet(((2**31 - 2, 2**31 - 1),)),
    )
    phases = (Phase.PREFILL, *[Phase.DECODE] * (said.MOST_PROGRAMS - 1))
    choices = ((0,), *(tuple(1 + (kind + 7 * each) % 31 for each in range(16)) for kind in range(31)))
    kinds = (0, *(1 + each % 31 for each in range(len(starts) - 1)))
    return Spans(prompt, starts, kinds, choices, phases, atoms)
