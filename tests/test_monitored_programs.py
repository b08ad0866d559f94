"""A monitor is sugar: what it comes to is what the same spec comes to with a gate written into it."""

from typing import Any

import pytest

from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.program.codec import decode, encode
from trimtab.program.monitor import behind, monitor_of, reaches
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate, VectorReference, check_monitor
from trimtab.sites import GateLimits, HookPoint, ModelSites, OwnGate, Phase, Site
from trimtab.spec import Steering
from trimtab.vectors import Probe, SteeringVector

WIDTH, LAYERS = 2, 4
SITES = frozenset(Site(layer, hook) for layer in range(LAYERS) for hook in HookPoint)
MODEL = ModelSites(WIDTH, LAYERS, SITES, GateLimits(2, SITES))
ANGER = Probe.at(Site(1, HookPoint.MLP_IN), [1.0, 0.0])
GATE = {"probe": ANGER, "threshold": 0.5, "sharpness": 2.0}
MONITOR = ResolvedGate.of(
    ANGER.vector, 0.5, 2.0, reference=VectorReference(MONITOR_LABEL, ANGER.vector.digest), label=MONITOR_LABEL
)
CALM = SteeringVector({Site(layer, HookPoint.POST_BLOCK): [1.0 + layer, 2.0] for layer in range(LAYERS)})
VECTORS = {"calm": CALM}

OWN = {"probe": {"post_block": {"0": [0.0, 1.0]}}, "threshold": 0.0}


def add(vector: Any = "calm", **more: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": vector, **more}


def asked(*steps: dict[str, Any], model: ModelSites = MODEL) -> ResolvedSteering:
    return Steering.parse({"interventions": list(steps)}).resolve(VECTORS, model)


EQUAL = {
    "a vector on both sides of the probe's site": (
        [add(scale=2.0)],
        [add(scale=2.0, phase="prefill"), add(scale=2.0, phase="decode", layers=[0]),
         add(scale=2.0, phase="decode", layers=[1, 2, 3], gate=GATE)],
    ),
    "one that begins at it": (
        [add({"mlp_in": {"1": [1.0, 2.0]}}, phase="decode")],
        [add({"mlp_in": {"1": [1.0, 2.0]}}, phase="decode", gate=GATE)],
    ),
    "hook points of one layer": (
        [add({"post_attn": {"1": [1.0, 2.0]}, "mlp_out": {"1": [3.0, 4.0]}}, phase="decode")],
        [add({"post_attn": {"1": [1.0, 2.0]}}, phase="decode"),
         add({"mlp_out": {"1": [3.0, 4.0]}}, phase="decode", gate=GATE)],
    ),
    "sums, and what stands behind a gate of its own": (
        [add(layers=[0, 2]), add(layers=[2, 3], scale=-0.5, phase="decode"), add(layers=[3], scale=3.0, gate=OWN)],
        [add(layers=[0, 2], phase="prefill"), add(layers=[0], phase="decode"), add(layers=[3], scale=3.0, gate=OWN),
         add(layers=[2], phase="decode", gate=GATE), add(layers=[2, 3], scale=-0.5, phase="decode", gate=GATE)],
    ),
    "what stands behind an equal gate already": (
        [add(layers=[2]), add(layers=[3], gate=GATE)],
        [add(layers=[2], phase="prefill"), add(layers=[2], phase="decode", gate=GATE), add(layers=[3], gate=GATE)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EQUAL)
def test_a_monitor_is_the_same_as_a_gate_before_the_part_from_its_probes_site_on(case: str) -> None:
    steps, written = EQUAL[case]
    found, wanted = behind(asked(*steps), MONITOR), asked(*written)
    assert found == wanted
    assert [found.identity(phase) for phase in Phase] == [wanted.identity(phase) for phase in Phase]
    assert found.prefill == asked(*steps).prefill
    assert monitor_of(found) == MONITOR.digest.hex()


@pytest.mark.parametrize("steps", [[add(phase="prefill")], [add(layers=[0])], [add(layers=[1], gate=OWN)]])
def test_what_the_monitor_leaves_alone_stays_as_it_is(steps: list[dict[str, Any]]) -> None:
    steering = asked(*steps)
    assert behind(steering, MONITOR) is steering
    assert monitor_of(steering) == ""


def test_what_is_behind_the_monitor_is_put_there_once() -> None:
    once = behind(asked(add(), add(layers=[2], scale=3.0)), MONITOR)
    assert behind(once, MONITOR) is once
    assert not reaches(once, MONITOR.site)


def test_another_monitor_is_another_identity_of_new_tokens_alone() -> None:
    steering, other = asked(add()), ResolvedGate.of(MONITOR.probe, 0.75, 2.0)
    found = {behind(steering, gate).identity(Phase.DECODE) for gate in (MONITOR, other)}
    assert len(found | {steering.identity(Phase.DECODE)}) == 3
    assert behind(steering, MONITOR).identity(Phase.PREFILL) == steering.identity(Phase.PREFILL)


def test_the_largest_values_of_a_spec_are_those_that_it_may_have_without_a_monitor() -> None:
    """The parts of a vector act at different sites: they are never added up."""
    large = SteeringVector({site: [60000.0, 0.0] for site in CALM.sites})
    found = behind(asked(add(large)), MONITOR)
    assert [term.vector.sites for term in found.decode.all_terms] == [CALM.sites[:1], CALM.sites[1:]]
    assert decode(encode(found), {MONITOR.probe.digest: MONITOR.probe}) == found
    with pytest.raises(SteeringError, match="values reach 70000, more than"):
        asked(add(large), add({"post_block": {"2": [10000.0, 0.0]}}))


def test_a_part_that_no_token_can_feel_is_left_out() -> None:
    uneven = SteeringVector({CALM.sites[0]: [1e-38, 0.0], CALM.sites[2]: [1.0, 0.0], CALM.sites[3]: [1e-38, 0.0]})
    found = behind(asked(add(uneven, scale=0.5)), MONITOR)
    assert found.decode.terms == ()
    assert found.decode.sites == (CALM.sites[2], CALM.sites[3])


def test_a_spec_that_uses_up_its_gates_may_stand_behind_a_monitor_too() -> None:
    engine = GateLimits(2, SITES, monitor=OwnGate(MONITOR.digest, MONITOR.site))
    own = [add(layers=[1], gate={**OWN, "threshold": number}) for number in (1.0, 2.0)]
    found = behind(asked(add(), *own), MONITOR)
    assert len(found.decode.gated) == engine.per_token == 3
    found.check_gate_count(engine, "steering")
    with pytest.raises(SteeringError, match="has 3 different gates on one token; this engine serves 2"):
        found.check_gate_count(GateLimits(2, SITES), "steering")


@pytest.mark.parametrize("layers", [None, [0, 1, 3]])
def test_a_registered_vector_travels_by_name_whatever_part_of_it_stands_where(layers: list[int] | None) -> None:
    held = {vector.digest: vector for vector in (CALM, ANGER.vector)}
    found = behind(asked(add(layers=layers), add({"post_block": {"2": [5.0, 6.0]}}, phase="prefill")), MONITOR)
    wire = encode(found)
    parts = [entry["part"] for entry in wire["vectors"] if "part" in entry]
    assert sorted(parts) == [[1, "mlp_in", False], [1, "mlp_in", True]]
    assert sum("data" in entry for entry in wire["vectors"]) == 1  # the inline one of the prompt
    back = decode(wire, held)
    assert back == found
    assert encode(back) == wire
    assert monitor_of(back) == MONITOR.digest.hex()
    sites = back.decode.gated[0].total.sites
    assert (back.decode.gated[0].total.row(sites) == found.decode.gated[0].total.row(sites)).all()


def test_a_hard_gate_is_no_monitor() -> None:
    check_monitor(MONITOR)
    with pytest.raises(SteeringError, match="hard: a monitor opens gradually"):
        check_monitor(ResolvedGate.of(MONITOR.probe, 0.5, None))


def test_what_cancels_behind_the_monitor_is_not_told_as_added() -> None:
    pair = [add(layers=[2], phase="decode"), add(layers=[2], phase="decode", scale=-1.0, gate=GATE)]
    found = behind(asked(*pair), MONITOR)
    assert (found.sites, found.vectors, found.probes, monitor_of(found)) == ((), (), (), "")
    other = add({"post_block": {"3": [1.0, 0.0]}}, phase="decode")
    beside = behind(asked(*pair, other), MONITOR)
    assert [origin.name for origin in beside.vectors] == [None]
    assert beside.probes == ()


def test_a_gate_that_equals_the_monitor_is_told_as_the_monitor_in_every_phase_and_process() -> None:
    anger = {**GATE, "probe": "anger"}
    steps = Steering.parse({"interventions": [add(layers=[3], phase="prefill", gate=anger), add(layers=[2])]})
    found = behind(steps.resolve(VECTORS, MODEL, {"anger": ANGER}), MONITOR)
    digests = {CALM.digest: CALM, ANGER.vector.digest: ANGER.vector}
    for told in (found, decode(encode(found), digests)):
        assert {item.gate.label for program in told.programs for item in program.gated} == {MONITOR_LABEL}
    alone = Steering.parse({"interventions": [add(layers=[3], phase="decode", gate=anger)]})
    assert monitor_of(behind(alone.resolve(VECTORS, MODEL, {"anger": ANGER}), MONITOR)) == MONITOR.digest.hex()
