"""Gates by themselves: their canonical numbers, and what an engine serves of them."""

import pytest

from trimtab.errors import SteeringError
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.codec import decode, encode
from trimtab.program.joint_gate import check_served
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.sites import GateLimits, HookPoint, Site
from trimtab.vectors import SteeringVector

SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in range(8)]


def vector(*layers: int, width: int = 3) -> SteeringVector:
    return SteeringVector({SITES[layer]: [float(layer + 1)] * width for layer in layers})


def gate(layer: int = 0, threshold: float = 0.0) -> ResolvedGate:
    return ResolvedGate.of(vector(layer), threshold, 1.0)


def test_a_threshold_of_minus_zero_is_zero() -> None:
    assert gate(threshold=-0.0).digest == gate(threshold=0.0).digest != gate(threshold=1e-30).digest


def test_a_probe_at_two_sites_is_none() -> None:
    with pytest.raises(SteeringError, match="probe: a probe is read at one site, this one has 2"):
        ResolvedGate.of(vector(0, 1), 0.0, 1.0)
    one = PhaseProgram.of([Term(vector(0, 1), 1.0), Term(vector(1), 1.0, gate=gate(0))])
    wire = encode(ResolvedSteering((one, one)))
    wire["gates"][0][0] = next(i for i, entry in enumerate(wire["vectors"]) if len(entry["sites"]) == 2)
    with pytest.raises(SteeringError, match=r"wire\.gates\[0\]: probe: a probe is read at one site"):
        decode(wire, {})


def test_an_engine_without_gates_serves_none() -> None:
    with pytest.raises(SteeringError, match="this engine serves no gates"):
        check_served(gate(), SITES, GateLimits(probe_sites=frozenset(SITES)))


def test_the_pipeline_boundary_that_is_named_is_the_one_behind_the_probe() -> None:
    limits = GateLimits(2, frozenset(SITES), stages=(3, 5, 7))
    check_served(gate(3), [SITES[3], SITES[4]], limits)
    with pytest.raises(SteeringError, match="pipeline stage that ends before layer 5"):
        check_served(gate(3), [SITES[6]], limits)


def test_gates_are_counted_in_either_phase() -> None:
    many = PhaseProgram.of([Term(vector(1), 1.0, gate=gate(threshold=float(number))) for number in range(3)])
    few = PhaseProgram.of([Term(vector(1), 1.0)])
    for phases in ((many, few), (few, many)):
        steering = ResolvedSteering(tuple(phases))
        steering.check_gate_count(GateLimits(count=3), "gates")
        with pytest.raises(SteeringError, match="gates: has 3 different gates on one token; this engine serves 2"):
            steering.check_gate_count(GateLimits(count=2), "gates")


def test_vectors_of_two_widths_do_not_add_behind_a_gate_either() -> None:
    narrow = ResolvedGate.of(vector(0, width=2), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"different widths cannot be added: \[2, 3\]"):
        PhaseProgram.of([Term(vector(1), 1.0), Term(vector(1, width=2), 1.0, gate=narrow)])
