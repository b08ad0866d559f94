"""Programs that requests with spans may have, as a user would say them, and what the device must hold for a token."""

from dataclasses import dataclass, field

import numpy as np
import torch
from runtime_model import HIDDEN, SITES, vector
from slots_model import FORM, VECTORS, Ask, done, due
from spans_model import Life, new_text, random_spans

from trimtab.ops import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.vectors.vector import SteeringVector

GATES = [ResolvedGate.of(vector(70 + each, (SITES[each % 3],)), 0.5 * each, each or None) for each in range(4)]


@dataclass(frozen=True)
class Said:
    """What is done to the tokens of one program."""

    terms: tuple[tuple[SteeringVector, float], ...] = ()
    gated: tuple[tuple[ResolvedGate, SteeringVector, float], ...] = ()
    asks: tuple[Ask, ...] = ()
    program: PhaseProgram = field(init=False)

    def __post_init__(self) -> None:
        terms = [Term(one, scale) for one, scale in self.terms]
        terms += [Term(one, scale, gate=gate) for gate, one, scale in self.gated]
        object.__setattr__(self, "program", PhaseProgram.of(terms, [ask.slot for ask in self.asks]))

    def check(self, buffers: SteeringBuffers, sums: np.ndarray, token: int, y: np.ndarray) -> None:
        """Raise AssertionError unless the device does this to `token`; `sums` is what all tokens receive."""
        want = np.zeros((len(SITES), HIDDEN))
        for one, scale in self.terms:
            for place, site in enumerate(SITES):
                want[place] += scale * one.directions[site].astype(np.float64) if site in one.directions else 0.0
        np.testing.assert_allclose(sums[token], want, rtol=1e-6, atol=1e-6)
        for site in SITES:
            np.testing.assert_allclose(done(buffers, y, token, site), due(y, self.asks, site), rtol=1e-4, atol=1e-4)
        assert buffers.gates is not None
        found = {}
        for lane, row in enumerate(buffers.gates.rows[token].tolist()):
            if buffers.gates.sites[token, lane]:
                coefficient, threshold, sharpness, *_ = buffers.gates.params[token, lane].tolist()
                probe = buffers.gates.probe_table[buffers.gates.probes[token, lane]].numpy().tobytes()
                found[probe, threshold, sharpness] = buffers.table[:, row].double().numpy() * coefficient
        assert found.keys() == {(g.probe.block[0].tobytes(), g.threshold, g.sharpness) for g, *_ in self.gated}
        for gate, one, scale in self.gated:
            sums_of_gate = found[gate.probe.block[0].tobytes(), gate.threshold, gate.sharpness]
            for place, site in enumerate(SITES):
                want_there = scale * one.directions[site] if site in one.directions else np.zeros(HIDDEN)
                np.testing.assert_allclose(sums_of_gate[place], want_there, rtol=1e-6, atol=1e-6)


NOTHING = Said()


def random_said(rng: np.random.Generator) -> Said:
    if rng.random() < 0.2:
        return NOTHING
    terms = [(vector(20 + int(each), SITES[each % 3 :]), float(rng.choice([-2.0, 0.5, 3.0]))) for each in
             rng.choice(5, rng.integers(0, 3), replace=False)]  # fmt: skip
    gated = [(GATES[each], vector(30 + int(rng.integers(3))), float(rng.choice([1.0, 2.5]))) for each in
             rng.choice(4, rng.integers(0, 3), replace=False)]  # fmt: skip
    asks = [Ask(VECTORS[each], 1.0, -0.5, float(rng.choice([0.5, 1.0]))) for each in
            rng.choice(4, rng.integers(0, 3), replace=False)]  # fmt: skip
    return Said(tuple(terms), tuple(gated), tuple(asks))


@dataclass
class Asking(Life):
    """A request with what its tokens are to receive: of each program, or of each phase; None: nothing."""

    says: tuple[Said, ...] | None = None
    owner: str = ""

    def due(self, text: list[int], position: int, programs: int) -> Said:
        return NOTHING if self.says is None else self.says[programs]


def random_request(rng: np.random.Generator, number: int) -> Asking:
    """Most have spans, some say no more than phases, some are not steered."""
    prompt, luck = int(rng.integers(1, 16) if rng.random() < 0.8 else rng.integers(60, 150)), rng.random()
    spans = random_spans(rng, prompt) if luck < 0.6 else None
    says = None if luck > 0.8 else tuple(random_said(rng) for _ in (spans.phases if spans else range(2)))
    life = Asking(f"r{number}", prompt, new_text(rng, prompt, spans), spans, says=says, owner=f"owner {number % 3}")
    if says is not None:
        life.steering = ResolvedSteering(tuple(said.program for said in says), spans=spans)
    return life


def span_buffers(sites=SITES, requests: int = 4, tokens: int = 1024) -> SteeringBuffers:
    return SteeringBuffers(
        sites, hidden_size=HIDDEN, max_rows=200, max_tokens=tokens, dtype=torch.float32, gates=2,
        max_probes=80, slots=FORM, span_requests=requests,
    )  # fmt: skip
