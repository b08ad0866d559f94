"""Gates in a request: what they resolve to, when two are the same, what is refused, and how they travel."""

import copy
import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.program.codec import decode, encode
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site
from trimtab.spec import Steering
from trimtab.vectors import Probe, SteeringVector

H = 4
SITES = frozenset(Site(layer, hook) for layer in range(6) for hook in HookPoint)
MODEL = ModelSites(H, 6, SITES, GateLimits(count=2, probe_sites=SITES))
CALM = SteeringVector({Site(layer, HookPoint.POST_BLOCK): [layer + 1.0] * H for layer in (2, 3)})
ANGRY = Probe.at(Site(1, HookPoint.POST_BLOCK), [0.5, -1.0, 2.0, 0.25], bias=0.75)
LATE = Probe.at(Site(3, HookPoint.POST_BLOCK), [1.0] * H)
PROBES = {"angry": ANGRY, "late": LATE}
VECTORS = {"calm": CALM}
BY_DIGEST = {CALM.digest: CALM, ANGRY.vector.digest: ANGRY.vector, LATE.vector.digest: LATE.vector}


def steering(*steps: dict[str, Any]) -> Steering:
    return Steering.parse({"interventions": [{"kind": "add", "vector": "calm"} | step for step in steps]})


def resolved(*steps: dict[str, Any], model: ModelSites = MODEL) -> ResolvedSteering:
    return steering(*steps).resolve(VECTORS, model, PROBES)


def gate(probe: Any = "angry", threshold: float = 1.0, **options: Any) -> dict[str, Any]:
    return {"gate": {"probe": probe, "threshold": threshold, **options}}


def test_a_gate_keeps_its_intervention_out_of_the_row_that_every_token_gets() -> None:
    program = resolved({"scale": 2.0}, {"scale": 0.5, **gate(sharpness=4)}).decode
    assert (program.row_key, program.factor) == (CALM.digest, 2.0)
    (item,) = program.gated
    assert (item.total.row_key, item.total.factor, item.total.gated) == (CALM.digest, 0.5, ())
    assert (item.gate.site, item.gate.sharpness, item.gate.hard) == (ANGRY.site, 4.0, False)
    np.testing.assert_array_equal(item.gate.probe.directions[ANGRY.site], ANGRY.direction)


def test_a_probes_bias_moves_the_threshold() -> None:
    (item,) = resolved(gate(threshold=1.0)).decode.gated
    assert item.gate.threshold == 0.25  # x . probe + 0.75 > 1 where x . probe > 0.25
    inline = {"post_block": {"1": [0.5, -1.0, 2.0, 0.25]}, "bias": 0.75}
    assert resolved(gate(inline)).decode.gated[0].gate == item.gate
    assert resolved(gate(ANGRY)).decode.gated[0].gate == item.gate


def test_a_hard_gate_has_no_slope() -> None:
    (item,) = resolved(gate(hard=True, invert=True)).decode.gated
    assert (item.gate.sharpness, item.gate.hard, item.gate.invert) == (0.0, True, True)


def test_interventions_behind_equal_gates_share_one_and_empty_ones_have_none() -> None:
    program = resolved({"scale": 2, **gate()}, {"scale": 1, **gate(sharpness=1.0)}).decode
    assert [item.total.factor for item in program.gated] == [3.0]
    nothing = resolved({"scale": 2, **gate()}, {"scale": -2, **gate()})
    assert (nothing.decode.gated, nothing.identity(Phase.DECODE), nothing.sites) == ((), "", ())


def test_a_phase_limits_a_gated_intervention_too() -> None:
    spec = resolved({"phase": "decode", **gate()}, {"phase": "prefill"})
    assert (spec.prefill.gated, len(spec.decode.gated)) == ((), 1)
    assert (spec.decode.row_key, spec.decode.terms) == (b"", ())
    assert spec.sites == CALM.sites


def test_gates_that_decide_differently_have_different_identities() -> None:
    moved = Probe.at(Site(0, HookPoint.POST_BLOCK), ANGRY.direction, bias=0.75)
    bent = Probe.at(ANGRY.site, ANGRY.direction + np.float32(1e-6), bias=0.75)
    options = [gate(), gate(threshold=1.0 + 1e-6), gate(sharpness=2.0), gate(hard=True), gate(invert=True)]
    options += [gate(hard=True, invert=True), gate(moved), gate(bent), {}, {"scale": 2.0, **gate()}, gate("late")]
    identities = [resolved(step).identity(Phase.DECODE) for step in options if step != gate("late")]
    assert len(set(identities)) == len(identities)
    both = resolved(gate(), gate(threshold=2.0)).identity(Phase.DECODE)
    swapped = resolved({"scale": 2, **gate()}, gate(threshold=2.0)).identity(Phase.DECODE)
    other = resolved(gate(), {"scale": 2, **gate(threshold=2.0)}).identity(Phase.DECODE)
    assert len({both, swapped, other}) == 3


thresholds = st.integers(-8, 8).map(lambda n: n / 4)
gates = st.one_of(
    st.none(),
    st.fixed_dictionaries({"probe": st.just("angry"), "threshold": thresholds, "invert": st.booleans()}),
)
steps = st.fixed_dictionaries(
    {"scale": st.integers(1, 8).map(lambda n: n / 4), "layers": st.sampled_from([[2], [3], [2, 3]]), "gate": gates}
)


@given(st.lists(steps, min_size=1, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_an_identity_ignores_the_order_and_naming_of_gates(items: list[dict[str, Any]], data: st.DataObject) -> None:
    roomy = ModelSites(H, 6, SITES, GateLimits(count=4, probe_sites=SITES))
    expected = resolved(*items, model=roomy)
    shuffled = [dict(step) for step in data.draw(st.permutations(items))]
    for step in shuffled:
        if step["gate"] is not None and data.draw(st.booleans()):
            step["gate"] = {**step["gate"], "probe": ANGRY}
    again = resolved(*shuffled, model=roomy)
    assert again == expected
    assert encode(again)["programs"] == encode(expected)["programs"]


def test_identities_of_gates_do_not_drift() -> None:
    """docs/gates.md in a few lines of hashlib: caches and workers of another build compare these."""

    def sha(content: bytes) -> bytes:
        return hashlib.sha256(content).digest()

    spec = resolved({"scale": 2.0}, {"scale": 0.5, **gate(sharpness=4, invert=True)})
    key = sha(b"trimtab gate 1\0" + ANGRY.vector.digest + struct.pack("<ff?", 0.25, 4.0, True))
    unit = 2.0**-13  # calm's largest number, 4, is 32768 of them
    numbers = [CALM.digest + struct.pack("<f", scale * unit) for scale in (2.0, 0.5)]
    plain, behind = (sha(b"trimtab program 2\0" + part) for part in numbers)
    whole = sha(b"trimtab gated program 1\0" + plain + b"\0" + key + behind)
    assert spec.identity(Phase.DECODE) == whole.hex()
    assert whole.hex() == "b0b25e2d646d26256f59e3171ca142c8ecf1c9ea6024f9236a42c63f871bb875"


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown probe": (gate("angri"), "interventions[0].gate.probe", "did you mean 'angry'"),
    "a vector's name": (gate("calm"), "interventions[0].gate.probe", "there is no probe 'calm'"),
    "vector before its probe": (gate("late"), "interventions[0].gate.probe", "acted at post_block:2"),
    "probe of another width": (
        gate({"post_block": {"1": [1.0]}}),
        "interventions[0].gate.probe",
        "has width 1, but its vector has 4",
    ),
    "probe with huge numbers": (
        gate({"post_block": {"1": [1e6] * H}}),
        "interventions[0].gate.probe",
        "values reach 1e+06",
    ),
    "bias that is no number": (
        gate({"post_block": {"1": [1.0] * H}, "bias": "x"}),
        "interventions[0].gate.probe.bias",
        "want a number",
    ),
    "sharpness that vanishes": (gate(sharpness=1e-60), "interventions[0].gate.sharpness", "from 1.2e-38 on"),
    "sharpness without digits": (gate(sharpness=1e-40), "interventions[0].gate.sharpness", "from 1.2e-38 on"),
    "probe without digits": (
        gate({"post_block": {"2": [1e-30] * H}}),
        "interventions[0].gate.probe",
        "multiply probe and threshold",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_gate_is_refused_where_the_fault_stands(case: str) -> None:
    step, field, message = REFUSALS[case]
    with pytest.raises(SteeringError) as refusal:
        resolved(step)
    assert refusal.value.field == field
    assert message in refusal.value.message


def test_a_probe_is_read_where_the_vector_acts_or_before_it_within_the_layer() -> None:
    at_own_site = resolved({"layers": [3], **gate("late")})
    assert at_own_site.sites == (Site(3, HookPoint.POST_BLOCK),)
    before = Probe.at(Site(2, HookPoint.PRE_ATTN), [1.0] * H)
    after = Probe.at(Site(3, HookPoint.PRE_ATTN), [1.0] * H)
    resolved(gate(before))
    with pytest.raises(SteeringError, match="read at pre_attn:3, after the vector has acted at post_block:2"):
        resolved(gate(after))


def test_within_a_layer_a_probe_after_its_vector_is_refused() -> None:
    hooks = list(HookPoint)
    for place, hook in enumerate(hooks):
        vector = {hook.value: {"3": [1.0] * H}}
        for other, reads in enumerate(hooks):
            step = {"kind": "add", "vector": vector, **gate(Probe.at(Site(3, reads), [1.0] * H))}
            spec = Steering.parse({"interventions": [step]})
            if other <= place:
                spec.resolve({}, MODEL)
                continue
            with pytest.raises(SteeringError, match=f"read at {reads}:3, after the vector has acted at {hook}:3"):
                spec.resolve({}, MODEL)


def test_what_an_engine_does_not_serve_is_refused_by_name() -> None:
    none = ModelSites(H, 6, SITES)
    with pytest.raises(SteeringError, match=r"interventions\[0\]\.gate: this engine serves no gates"):
        resolved(gate(), model=none)
    three = [gate(threshold=float(n)) for n in range(3)]
    with pytest.raises(SteeringError, match=r"interventions: has 3 different gates on one token; .* serves 2"):
        resolved(*three)
    few = ModelSites(H, 6, SITES, GateLimits(count=2, probe_sites=frozenset({Site(0, HookPoint.POST_BLOCK)})))
    with pytest.raises(
        SteeringError, match=r"gate\.probe: no probe can be read at post_block:1 here, only at post_blo"
    ):
        resolved(gate(), model=few)


def test_a_gate_across_pipeline_stages_is_refused_with_the_boundary_named() -> None:
    staged = ModelSites(H, 6, SITES, GateLimits(count=2, probe_sites=SITES, stages=(3,)))
    resolved({"layers": [2], **gate()}, model=staged)
    with pytest.raises(SteeringError, match=r"gate\.probe: is read at post_block:1, .* before layer 3"):
        resolved(gate(), model=staged)


def test_gated_sums_count_towards_the_largest_value() -> None:
    large = {"post_block": {"4": [40000.0] * H}}
    with pytest.raises(SteeringError, match="values reach 80000"):
        resolved({"vector": large}, {"vector": large, **gate()})


def test_inline_probes_count_towards_the_size_of_a_request() -> None:
    wide = np.zeros(2 << 20, np.float32)
    vector = SteeringVector({Site(1, HookPoint.POST_BLOCK): wide})
    step = {"kind": "add", "vector": vector, **gate(Probe.at(Site(0, HookPoint.POST_BLOCK), wide))}
    with pytest.raises(SteeringError, match="inline vectors take 33554432 bytes"):
        Steering.parse({"interventions": [step, step]})


def test_a_spec_with_an_inline_probe_dumps_to_json_that_reads_back_to_it() -> None:
    spec = steering(gate(ANGRY, sharpness=2.0, invert=True), gate("late"))
    assert Steering.parse(spec.model_dump_json()) == spec


MIXED = resolved(
    {"scale": 0.3},
    {"scale": 2, **gate(sharpness=3, invert=True)},
    {"phase": "decode", **gate(LATE, hard=True), "layers": [3]},
)


def test_gated_steering_comes_back_bit_for_bit() -> None:
    wire = encode(MIXED)
    back = decode(copy.deepcopy(wire), BY_DIGEST)
    assert back == MIXED
    assert encode(back) == wire
    assert [entry.get("name") for entry in wire["vectors"]].count("angry") == 1
    assert sum("data" in entry for entry in wire["vectors"]) == 1  # the probe that was given inline


MALFORMED: dict[str, tuple[list[Any], Any, str]] = {
    "gates is no list": (["gates"], {}, "wire.gates"),
    "gate of three": (["gates", 0], [0, 1.0, 1.0], "wire.gates[0]"),
    "probe out of range": (["gates", 0, 0], 9, "wire.gates[0][0]"),
    "threshold NaN": (["gates", 0, 1], float("nan"), "wire.gates[0][1]"),
    "sharpness negative": (["gates", 0, 2], -1.0, "wire.gates[0]"),
    "invert is a number": (["gates", 0, 3], 1, "wire.gates[0][3]"),
    "gate index out of range": (["programs", 1, 2, 2], 7, "wire.programs[1][2][2]"),
    "gate index true": (["programs", 1, 2, 2], True, "wire.programs[1][2][2]"),
    "entry of four": (["programs", 1, 2], [0, 1.0, 0, 0], "wire.programs[1][2]"),
    "vector before its probe": (["programs", 1, 2, 0], 0, "wire.programs[1][2][2]"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_gate_on_the_wire_is_refused_where_the_fault_stands(case: str) -> None:
    path, value, field = MALFORMED[case]
    wire: Any = copy.deepcopy(encode(MIXED))
    if case == "vector before its probe":  # the term behind the late gate made to add the whole vector
        late = next(i for i, g in enumerate(wire["gates"]) if g[2] == 0.0)
        term = next(i for i, t in enumerate(wire["programs"][1]) if len(t) == 3 and t[2] == late)
        calm = next(i for i, v in enumerate(wire["vectors"]) if v.get("name") == "calm" and v["layers"] is None)
        path, value, field = ["programs", 1, term, 0], calm, f"wire.programs[1][{term}][2]"
    place = wire
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SteeringError) as refusal:
        decode(wire, BY_DIGEST)
    assert refusal.value.field == field
