"""What kinds refuse: each fault at the caller's own path, with what would be right."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kinds_cases import HERE, MODEL, NAMED, SITES, H, resolve, vector
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.serving.server_default import ServerDefault, merge
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

V, T = vector(1), vector(2)
ELSEWHERE = vector(3, (Site(3, HookPoint.POST_BLOCK),))
BOTH = vector(4, (HERE, Site(3, HookPoint.POST_BLOCK)))
ZERO = SteeringVector({HERE: np.ones(H), Site(4, HookPoint.MLP_IN): np.zeros(H)})
NARROW = SteeringVector({HERE: np.ones(H - 1)})


def clamp(**more: Any) -> dict[str, Any]:
    return {"kind": "clamp", "vector": V, **more}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "ablate: strength above 2": ({"kind": "ablate", "vector": V, "strength": 2.5}, "strength", "from 0 to 2"),
    "ablate: negative strength": ({"kind": "ablate", "vector": V, "strength": -1}, "strength", "from 0 to 2"),
    "ablate: strength in words": ({"kind": "ablate", "vector": V, "strength": "1"}, "strength", "want a number"),
    "ablate: a scale": ({"kind": "ablate", "vector": V, "scale": 1}, "scale", "unknown key"),
    "ablate: a zero direction": ({"kind": "ablate", "vector": ZERO}, "vector", "is zero at mlp_in:4"),
    "ablate: unknown name": ({"kind": "ablate", "vector": "clam"}, "vector", "no vector is registered"),
    "scale: no factor": ({"kind": "scale", "vector": V}, "factor", "is required"),
    "scale: factor of another world": ({"kind": "scale", "vector": V, "factor": 1e6}, "factor", "at most 65504"),
    "scale: factor too far from 1": ({"kind": "scale", "vector": V, "factor": -65504.0}, "factor", "at most 65504"),
    "clamp: no bound": (clamp(), "", "give `min`, `max` or `value`"),
    "clamp: no bound but strength": (clamp(strength=0.5, min=None), "", "give `min`, `max` or `value`"),
    "clamp: min above max": (clamp(min=2, max=1), "min", "is 2, above `max`, which is 1"),
    "clamp: min above max at one layer": (
        clamp(min={"2": 0, "3": 2}, max=1, layers=[2, 3]), "min", "is 2 at layer 3, above `max`",
    ),
    "clamp: value and max": (clamp(value=1, max=2), "value", "is `min` and `max` at once"),
    "clamp: strength above 1": (clamp(max=1, strength=1.5), "strength", "from 0 to 1"),
    "clamp: infinite bound": (clamp(max=float("inf")), "max", "finite in float32"),
    "clamp: a bound that no dtype can hold": (clamp(min=-70000), "min", "beyond the 65504"),
    "clamp: bound of a layer in words": (clamp(max={"2": "high"}), "max.2", "want a number"),
    "clamp: bounds of no layer": (clamp(max={}), "max", "is empty"),
    "clamp: bound of no layer's name": (clamp(max={"two": 1}), "max", "want a layer"),
    "clamp: bound of a negative layer": (clamp(max={-1: 1}), "max", "want a layer"),
    "clamp: a layer's bound twice": (clamp(max={"2": 1, 2: 1}), "max", "layer 2 is given twice"),
    "clamp: a layer without bound": (clamp(max={"3": 1}, layers=[2, 3]), "max", "no number for layer 2"),
    "clamp: a bound too many": (clamp(max={"2": 1, "5": 1}), "max.5", "does not act at layer 5"),
    "clamp: bounds without end": (clamp(max={str(i): 1 for i in range(2000)}), "max", "at most 1024"),
    "swap: no `to`": ({"kind": "swap", "vector": V}, "to", "is required"),
    "swap: unknown `to`": ({"kind": "swap", "vector": V, "to": "joy"}, "to", "there is no vector 'joy'"),
    "swap: `to` in words": ({"kind": "swap", "vector": V, "to": 3}, "to", "got int"),
    "swap: `to` elsewhere": ({"kind": "swap", "vector": V, "to": ELSEWHERE}, "to", "acts at post_block:3"),
    "swap: `to` of another width": ({"kind": "swap", "vector": V, "to": NARROW}, "to", "has width 7"),
    "swap: `to` itself": ({"kind": "swap", "vector": V, "to": V * 3}, "to", "is the same direction as `vector`"),
    "swap: a zero `to`": ({"kind": "swap", "vector": V, "to": ZERO.at([2]) * 0}, "to", "is zero at post_block:2"),
    "swap: `to` without that layer": (
        {"kind": "swap", "vector": BOTH, "to": BOTH * -1, "layers": [5]}, "layers", "layer 5 is not among",
    ),
    "another width": ({"kind": "ablate", "vector": NARROW}, "vector", "has width 7, but interventions[0] has 8"),
    "a kind of one's own": ({"kind": "ablaet", "vector": V}, "kind", "did you mean 'ablate'"),
    "a gate behind its vector": (
        {"kind": "ablate", "vector": V, "gate": {"probe": Probe(ELSEWHERE), "threshold": 0}}, "gate.probe",
        "is read at post_block:3, after the vector has acted at post_block:2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_fault_is_told_at_the_callers_path(case: str) -> None:
    step, field, said = REFUSED[case]
    with pytest.raises(SteeringError) as caught:
        resolve({"kind": "add", "vector": T}, step)
    assert caught.value.field == f"interventions[1]{field and '.' + field}"
    assert said in caught.value.message


LIMITS: dict[str, tuple[SlotLimits, str, str]] = {
    "no slots": (SlotLimits(), "interventions[1].kind", "start it with --steering-slots 1, and ablate in"),
    "other kinds": (
        SlotLimits(4, SITES, frozenset({"clamp", "scale"})), "interventions[1].kind", "--steering-kinds (clamp, scale)",
    ),
    "other layers": (
        SlotLimits(4, frozenset({Site(3, HookPoint.POST_BLOCK)}), NAMED), "interventions[1].vector",
        "acts at post_block:2, where this engine has no slots, which `ablate` needs: they are at post_block:3; narrow "
        "it with `layers`, or start the engine with more --steering-slot-layers",
    ),
    "fewer slots": (SlotLimits(1, SITES, NAMED), "interventions", "has 2 slots at post_block:2 on one token"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_what_was_not_declared_is_refused_with_the_flag_that_would_serve_it(case: str) -> None:
    limits, field, said = LIMITS[case]
    steps = [{"kind": "add", "vector": V}, {"kind": "ablate", "vector": V}]
    steps += [{"kind": "clamp", "vector": T, "max": 1}] if case == "fewer slots" else []
    with pytest.raises(SteeringError) as caught:
        resolve(*steps, model=replace(MODEL, slots=limits))
    assert caught.value.field == field
    assert said in caught.value.message


def test_an_engine_without_slots_adds_as_before() -> None:
    model = ModelSites(H, MODEL.num_layers, SITES)
    assert resolve({"kind": "add", "vector": V}, model=model).slots == ()


def test_more_slots_than_an_engine_could_declare_are_not_told_of_a_flag() -> None:
    """No flag makes room in the embedded engine, nor for more than a server may declare."""
    steps = [{"kind": "clamp", "vector": V, "max": 1}, {"kind": "ablate", "vector": T}]
    for limits, told in (((1, SITES, NAMED), True), ((1, SITES, NAMED, 1), False), ((1, SITES, NAMED, 2), True)):
        with pytest.raises(SteeringError, match="serves 1 there: ") as refused:
            resolve(*steps, model=replace(MODEL, slots=SlotLimits(*limits)))
        assert ("--steering-slots 2" in refused.value.message) is told
        assert refused.value.message.endswith("leave interventions out")


def test_one_direction_in_two_slots_counts_as_one() -> None:
    limits = replace(MODEL, slots=SlotLimits(1, SITES, NAMED))
    steps = [{"kind": "clamp", "vector": V, "max": 1}, {"kind": "clamp", "vector": V * 2, "min": -1}]
    assert len(resolve(*steps, model=limits).decode.slots) == 1
    phases = [
        {"kind": "clamp", "vector": V, "max": 1, "phase": "decode"},
        {"kind": "ablate", "vector": T, "phase": "prefill"},
    ]
    assert len(resolve(*phases, model=limits).slots) == 2


CLASHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "different things": (
        {"kind": "ablate", "vector": V}, clamp(min=1), "act along one direction",
    ),
    "different strengths": (
        {"kind": "ablate", "vector": V}, {"kind": "scale", "vector": V * -1, "factor": 0.5}, "act along one direction",
    ),
    "too close": (
        {"kind": "ablate", "vector": V},
        {"kind": "ablate", "vector": SteeringVector({HERE: V.block[0] + 0.01 * T.block[0]})},
        "cannot act together at post_block:2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASHES)
def test_slots_that_clash_are_named_both(case: str) -> None:
    one, other, said = CLASHES[case]
    with pytest.raises(SteeringError) as caught:
        resolve(one, {"kind": "add", "vector": T}, other)
    assert caught.value.field == "interventions"
    assert said in caught.value.message
    for kind, place in ((one["kind"], 0), (other["kind"], 2)):
        assert f"{kind} at interventions[{place}]" in caught.value.message


def test_a_servers_default_is_part_of_the_sets() -> None:
    default = ServerDefault.parse({"interventions": [{"kind": "ablate", "vector": "refusal"}]})
    names = {"refusal": V, "mine": V * 0.5}
    clash = Steering.parse({"interventions": [{"kind": "clamp", "vector": "mine", "min": 3}]})
    clash.resolve(names, MODEL)
    with pytest.raises(SteeringError, match=r"('refusal'|'mine').* ask for different things") as caught:
        merge(default.spec, clash).resolve(names, MODEL, defaults=default.count)
    assert "ablate at the default's interventions[0]" in caught.value.message
    assert "clamp at interventions[0]" in caught.value.message
    same = Steering.parse({"interventions": [{"kind": "ablate", "vector": "mine"}]})
    assert len(merge(default.spec, same).resolve(names, MODEL).decode.slots) == 1


def test_inline_content_of_every_field_counts_towards_the_limit() -> None:
    big = np.ones((600, 4096), np.float32)
    sites = [Site(layer, HookPoint.POST_BLOCK) for layer in range(600)]
    one, other = SteeringVector.from_block(sites, big), SteeringVector.from_block(sites, -big)
    Steering.parse({"interventions": [{"kind": "ablate", "vector": one}]})
    with pytest.raises(SteeringError, match="inline vectors take 19660800 bytes"):
        Steering.parse({"interventions": [{"kind": "swap", "vector": one, "to": other}]})


def told(steering: ResolvedSteering) -> list[str | None]:
    return [origin.name for origin in steering.vectors]


def test_receipts_name_every_vector_of_a_slot_that_does_something() -> None:
    names = {"calm": V, "joy": T, "rage": vector(9)}
    swap = {"kind": "swap", "vector": "calm", "to": "joy"}
    assert told(resolve(swap, names=names)) == ["calm", "joy"]
    assert told(resolve(swap, {"kind": "scale", "vector": "rage", "factor": 1}, names=names)) == ["calm", "joy"]
    assert told(resolve({"kind": "clamp", "vector": "rage", "max": 1, "strength": 0}, names=names)) == []
    assert told(resolve(clamp(vector=names["calm"] * 2, max=1), clamp(vector="calm", min=0), names=names)) == [
        None,
        "calm",
    ]


def test_gates_of_slots_are_gates_of_the_receipt() -> None:
    probe = Probe(SteeringVector({Site(1, HookPoint.MLP_IN): np.ones(H)}))
    gate = {"probe": "anger", "threshold": 0.5}
    steps = [{"kind": "ablate", "vector": V, "gate": gate}, {"kind": "scale", "vector": T, "factor": 1, "gate": gate}]
    spec = Steering.parse({"interventions": steps})
    resolved = spec.resolve({}, MODEL, {"anger": probe})
    assert [origin.name for origin in resolved.probes] == ["anger"]
    assert [len(program.gated) for program in resolved.programs] == [1, 1]
    idle = Steering.parse({"interventions": steps[1:]}).resolve({}, MODEL, {"anger": probe})
    assert (idle.probes, idle.gates, idle.sites) == ((), (), ())


def test_too_many_gates_of_slots_are_refused() -> None:
    probe = Probe(SteeringVector({Site(1, HookPoint.MLP_IN): np.ones(H)}))
    steps = [{"kind": "ablate", "vector": vector(20 + i), "gate": {"probe": probe, "threshold": i}} for i in range(3)]
    model = replace(MODEL, gates=GateLimits(2, SITES))
    resolve(*steps[:2], model=model)
    with pytest.raises(SteeringError, match="has 3 different gates on one token"):
        resolve(*steps, model=model)
