"""Strength by a token's place in the answer: what operators make of a stream once the device has decided."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from runtime_model import HIDDEN, SITES, vector
from slots_model import FORM, VECTORS, Ask
from slots_model import due as slotted
from torch import nn

from trimtab.ops import Emission, SteeringBuffers, emit, set_emission
from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Term
from trimtab.program.joint_gate import Join, JointGate, joined, scheduled
from trimtab.program.lowering import contents_of
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.schedules import Schedule
from trimtab.program.spans import Spans
from trimtab.runtime import SteeringRuntime
from trimtab.sites import Phase

PROMPT, TOKENS = 5, 40
FADING, RISING, LATE = Schedule.decay(0.9), Schedule.ramp(0, 8), Schedule.ramp(10, 14)
GATE = ResolvedGate.of(vector(70, SITES[:1]), 0.1, 0.7)
HARD = ResolvedGate.of(vector(71, SITES[:1]), 0.0, None)
ANY = joined(Join.ANY, [GATE, HARD])
HELD = Ask(VECTORS[0], 1.0, -0.25, 0.25, sites=SITES[1:])


def opened(gate: ResolvedGate | JointGate, streams: Sequence[np.ndarray], token: int) -> float:
    """A gate's own factor, in float64."""
    if isinstance(gate, JointGate):
        each = [opened(member, streams, token) for member in gate.members]
        return 1.0 - float(np.prod([1.0 - one for one in each]))
    score = float(streams[SITES.index(gate.site)][token] @ gate.probe.block[0])
    return (
        float(score > gate.threshold) if gate.hard else 1.0 / (1.0 + np.exp(-gate.sharpness * (score - gate.threshold)))
    )


def behind(gate: ResolvedGate | None, schedule: Schedule) -> ResolvedGate | JointGate:
    return scheduled(gate, schedule, SITES[0], HIDDEN)


# Of each program what it adds: vector, scale, gate, schedule; and whether it holds a projection by a schedule.
SAID = {
    "nothing": ([], None),
    "a row": ([(vector(1), 2.0, None, FADING)], None),
    "a row that begins late": ([(vector(1), -1.0, None, LATE)], None),
    "two schedules": ([(vector(1), 2.0, None, FADING), (vector(2), 1.0, None, RISING)], None),
    "a row, and one that fades": ([(vector(3), 1.5, None, None), (vector(1), 2.0, None, FADING)], None),
    "behind a gate": ([(vector(1), 2.0, GATE, RISING), (vector(2), 0.5, GATE, None)], None),
    "behind any of two": ([(vector(2), 1.0, ANY, FADING)], None),
    "a slot": ([(vector(3), 1.0, None, None)], LATE),
    "a slot and a row": ([(vector(1), 2.0, None, FADING)], RISING),
}


def program(name: str) -> PhaseProgram:
    added, held = SAID[name]
    terms = [Term(one, scale, gate=behind(gate, follows) if follows else gate) for one, scale, gate, follows in added]
    slots = [] if held is None else [Ask(HELD.along, 1.0, -0.25, 0.25, sites=HELD.sites, gate=behind(None, held)).slot]
    return PhaseProgram.of(terms, slots)


def expected(name: str, streams: Sequence[np.ndarray], token: int, place: int) -> list[np.ndarray]:
    """The streams of one token once it is steered: at each site what was given there, since no layer is between."""
    added, held = SAID[name]
    done = []
    for number, site in enumerate(SITES):
        z = streams[number][token].copy()
        for one, scale, gate, follows in added:
            factor = 1.0 if follows is None else follows.factor(place)
            factor *= 1.0 if gate is None else opened(gate, streams, token)
            z += factor * scale * one.directions[site].astype(np.float64)
        if held is not None:
            z += held.factor(place) * (slotted(z, [HELD], site) - z)
        done.append(z)
    return done


class Steered:
    """A request with all of these programs, one after the other over its answer, and three layers."""

    def __init__(self) -> None:
        self.buffers = SteeringBuffers(SITES, hidden_size=HIDDEN, max_rows=60, max_tokens=TOKENS, dtype=torch.float32,
                                       gates=4, max_probes=20, slots=FORM, span_requests=2)  # fmt: skip
        self.runtime = SteeringRuntime(self.buffers, max_requests=2)
        self.modules = [nn.Module() for _ in SITES]
        for module, site in zip(self.modules, SITES, strict=True):
            self.buffers.attach(module, site)
            set_emission(module, Emission(eager=True))
        names = list(SAID)
        kinds = (0, *(1 + run % len(names) for run in range(3 * len(names))))
        starts = (0, *range(PROMPT, PROMPT + 3 * len(names)))
        phases = (Phase.PREFILL, *[Phase.DECODE] * len(names))
        self.spans = Spans(PROMPT, starts, kinds, tuple((each,) for each in range(1 + len(names))), phases)
        self.steering = ResolvedSteering((EMPTY, *map(program, names)), spans=self.spans)
        self.runtime.admit("a", self.steering)

    def steer(self, first: int, count: int, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """The streams of a pass before and after, at each site."""
        positions = torch.arange(first, first + count, dtype=torch.int32)
        self.runtime.step(["a"], [first], [count], [PROMPT], positions=positions, token_ids=positions)
        streams = [torch.from_numpy(rng.standard_normal((count, HIDDEN)).astype(np.float32)) for _ in SITES]
        out = [emit(*each) for each in zip(self.modules, [s.hook for s in SITES], streams, strict=True)]
        return [(x.double().numpy(), z.double().numpy()) for x, z in zip(streams, out, strict=True)]


@pytest.mark.parametrize("count", [1, 3, 32])
def test_each_token_of_an_answer_is_steered_as_far_as_its_place_says(count: int) -> None:
    steered, rng, names = Steered(), np.random.default_rng(count), list(SAID)
    for first in range(0, PROMPT + 27, count):
        told = steered.steer(first, count, rng)
        streams = [x for x, _ in told]
        for token in range(count):
            place = first + token - PROMPT
            name = "nothing" if place < 0 else names[steered.spans.programs_at(first + token)[0] - 1]
            wanted = expected(name, streams, token, place)
            for (_, z), want in zip(told, wanted, strict=True):
                np.testing.assert_allclose(z[token], want, rtol=2e-5, atol=2e-5, err_msg=f"{name}, token {place}")


def test_a_request_by_schedules_holds_the_contents_that_are_reserved_for_it_and_says_so_in_the_digest() -> None:
    steered = Steered()
    held = contents_of(steered.steering, lowers=False)
    assert steered.runtime.rows_in_use == len(held.rows)
    digests = []
    for schedule in (FADING, RISING, FADING):
        one = Steered()
        cases = (EMPTY, PhaseProgram.of([Term(vector(1), 2.0, gate=behind(None, schedule))]))
        spans = Spans(PROMPT, (0, PROMPT), (0, 1), ((0,), (1,)), (Phase.PREFILL, Phase.DECODE))
        one.runtime.admit("a", ResolvedSteering(cases, spans=spans))
        digests.append(one.runtime.digest())
    assert digests[0] == digests[2] != digests[1]
