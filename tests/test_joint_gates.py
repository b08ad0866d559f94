"""Gates of several in a request: what they resolve to, what is refused, how they are counted and how they travel."""

import copy
import hashlib
import itertools
from typing import Any

import pytest

from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.program.codec import decode, encode
from trimtab.program.lowering import contents_of, placed
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.sites import GateLimits, HookPoint, ModelSites, OwnGate, Phase, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.vectors import Probe, SteeringVector

H = 4
SITES = frozenset(Site(layer, hook) for layer in range(6) for hook in HookPoint)
SLOTS = SlotLimits(4, SITES, frozenset({"ablate"}))
MODEL = ModelSites(H, 6, SITES, GateLimits(count=8, probe_sites=SITES), slots=SLOTS)
CALM = SteeringVector({Site(layer, HookPoint.POST_BLOCK): [layer + 1.0] * H for layer in (3, 4)})
PROBES = {
    name: Probe.at(Site(layer, HookPoint.POST_BLOCK), direction, bias=0.5)
    for name, layer, direction in (
        ("angry", 1, [0.5, -1.0, 2.0, 0.25]),
        ("sad", 1, [1.0, 0.0, 0.0, 1.0]),
        ("tired", 0, [0.0, 1.0, -1.0, 0.0]),
        ("late", 3, [1.0] * H),
        ("last", 5, [1.0] * H),
    )
}
BY_DIGEST = {CALM.digest: CALM, **{probe.vector.digest: probe.vector for probe in PROBES.values()}}


def gate(probe: Any = "angry", threshold: float = 1.0, **options: Any) -> dict[str, Any]:
    return {"probe": probe, "threshold": threshold, **options}


def spec(*gates: dict[str, Any] | None, kind: str = "add", **options: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": kind, "vector": "calm", "gate": one, **options} for one in gates]}


def resolved(given: dict[str, Any], model: ModelSites = MODEL) -> ResolvedSteering:
    return Steering.parse(given).resolve({"calm": CALM}, model, PROBES)


def refused(given: dict[str, Any], model: ModelSites = MODEL) -> SteeringError:
    with pytest.raises(SteeringError) as refusal:
        resolved(given, model)
    return refusal.value


THREE = [gate(), gate("sad", hard=True), gate("tired", 0.25, invert=True)]


@pytest.mark.parametrize("join", ["all", "any"])
def test_the_order_in_which_members_are_written_changes_nothing(join: str) -> None:
    expected = resolved(spec({join: THREE}))
    (item,) = expected.decode.gated
    assert [member.site.layer for member in item.gate.members] == [0, 1, 1]
    for members in itertools.permutations(THREE):
        again = resolved(spec({join: list(members)}))
        assert again == expected
        assert encode(again) == encode(expected)
        assert [one.label for one in again.decode.gated[0].gate.members] == [one.label for one in item.gate.members]


def test_a_gate_of_one_is_that_gate() -> None:
    alone = resolved(spec(gate()))
    for join in ("all", "any"):
        one = resolved(spec({join: [gate()]}))
        assert one == alone
        assert encode(one) == encode(alone)


def test_gates_that_decide_differently_have_different_identities() -> None:
    two = THREE[:2]
    options = [{"all": two}, {"any": two}, {"all": THREE}, two[0], two[1], {"all": [two[0], gate("sad")]}, None]
    identities = [resolved(spec(one)).identity(Phase.DECODE) for one in options]
    assert len(set(identities)) == len(options)
    both = resolved(spec(*two)).identity(Phase.DECODE)  # one intervention behind each is another thing
    assert both not in identities


def test_identities_of_joint_gates_do_not_drift() -> None:
    """docs/formats.md in a few lines of hashlib: caches and workers of another build compare these."""
    (item,) = resolved(spec({"any": THREE})).decode.gated
    members = [ResolvedGate.of(PROBES["tired"].vector, -0.25, 1.0, invert=True).digest]
    members += sorted(
        [
            ResolvedGate.of(PROBES["angry"].vector, 0.5, 1.0).digest,
            ResolvedGate.of(PROBES["sad"].vector, 0.5, None).digest,
        ]
    )
    assert item.gate.digest == hashlib.sha256(b"trimtab joint gate 1\0any\0" + b"".join(members)).digest()


def test_equal_joint_gates_are_one_and_the_better_known_is_kept() -> None:
    inline = [{**one, "probe": PROBES[one["probe"]]} for one in THREE]
    program = resolved(spec({"all": inline}, {"all": THREE}, {"all": THREE[::-1]})).decode
    (item,) = program.gated
    assert item.total.factor == 3.0
    assert sorted(member.label for member in item.gate.members) == ["angry", "sad", "tired"]


REFUSALS: dict[str, tuple[Any, str, str]] = {
    "empty": ({"all": []}, ".all", "name at least one gate"),
    "no list": ({"any": gate()}, ".any", "got dict, want a list of gates"),
    "no list but null": ({"any": None}, ".any", "got NoneType, want a list of gates"),
    "too many": ({"all": [gate(threshold=float(i)) for i in range(17)]}, ".all", "at most 16"),
    "no object": ({"all": [gate(), 3]}, ".all[1]", "got int, want an object"),
    "null": ({"all": [gate(), None]}, ".all[1]", "want an object"),
    "all and any": ({"all": [gate()], "any": [gate("sad")]}, ".any", "cannot stand beside `all`"),
    "threshold beside": ({"all": THREE, "threshold": 1.0}, ".threshold", "each member says for itself"),
    "invert beside": ({"any": THREE, "invert": True}, ".invert", "of the inverted members"),
    "nested": ({"all": [gate(), {"all": THREE}]}, ".all[1]", "an `all` within an `all` is one list"),
    "nested otherwise": ({"any": [{"all": THREE}, gate()]}, ".any[0]", "a member has one probe"),
    "unknown key in a member": ({"any": [gate(), gate(sharpnes=2)]}, ".any[1].sharpnes", "did you mean 'sharpness'"),
    "member without threshold": ({"any": [{"probe": "sad"}]}, ".any[0].threshold", "is required"),
    "unknown probe": ({"all": [gate(), gate("angri")]}, ".all[1].probe", "did you mean 'angry'"),
    "twice": ({"all": [gate(), gate("sad"), gate(sharpness=1.0)]}, ".all[2]", "equals all[0]: leave one of them out"),
    "sharpness that vanishes": ({"all": [gate("sad"), gate(sharpness=1e-60)]}, ".all[1].sharpness", "from 1.2e-38 on"),
    "after its vector": ({"all": [gate("last"), gate()]}, ".all[0].probe", "acted at post_block:3"),
    "of another width": (
        {"all": [gate(), gate({"post_block": {"1": [1.0]}})]},
        ".all[1].probe",
        "has width 1, but its vector has 4",
    ),
    "key that is no text": ({"all": [{3: 4}]}, ".all[0]", "keys are text"),
    "not an object": ([gate()], "", "got list, want an object"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_gate_of_several_is_refused_where_the_fault_stands(case: str) -> None:
    given, field, message = REFUSALS[case]
    found = refused(spec(given))
    assert found.field == f"interventions[0].gate{field}"
    assert message in found.message


def test_each_member_counts_towards_the_gates_of_a_request() -> None:
    three = ModelSites(H, 6, SITES, GateLimits(count=3, probe_sites=SITES))
    resolved(spec({"all": THREE}), three)
    resolved(spec(gate(), gate("sad"), {"any": [gate(threshold=4.0)]}), three)
    for given in (spec({"all": THREE}, gate()), spec({"all": THREE[:2]}, {"any": THREE[1:]})):
        found = refused(given, three)
        assert found.field == "interventions"
        assert "has 4 different gates on one token; this engine serves 3" in found.message
        assert "in `all` and `any` each member counts" in found.message
    none = ModelSites(H, 6, SITES)
    assert refused(spec({"all": THREE}), none).field == "interventions[0].gate"


def test_a_member_that_the_engine_cannot_read_is_named() -> None:
    some = SITES - {PROBES["tired"].site}
    found = refused(spec({"all": THREE}), ModelSites(H, 6, SITES, GateLimits(count=8, probe_sites=some)))
    assert found.field == "interventions[0].gate.all[2].probe"
    assert "no probe can be read at post_block:0 here" in found.message


def test_members_in_several_pipeline_stages_are_refused_with_the_boundary_named() -> None:
    two = {"all": [gate("late", hard=True), gate()]}
    staged = ModelSites(H, 6, SITES, GateLimits(count=8, probe_sites=SITES, stages=(2,)))
    found = refused(spec(two), staged)
    assert found.field == "interventions[0].gate.all[1].probe"
    assert "beyond the pipeline stage that ends before layer 2" in found.message
    resolved(spec(two), ModelSites(H, 6, SITES, GateLimits(count=8, probe_sites=SITES, stages=(5,))))


def test_slots_stand_behind_the_lane_of_the_last_member() -> None:
    given = spec({"all": THREE}, gate("late"), kind="ablate")
    given["interventions"][0]["layers"] = [3]
    given["interventions"][1]["layers"] = [4]
    program = resolved(given).decode
    members = [member for item in program.gated for member in item.gate.members]
    for slot, lane in zip(program.slots, program.lanes, strict=True):
        assert slot.gate is not None
        assert members[lane - 1] == slot.gate.members[-1]
    assert program.lane_count == 4


def test_a_request_holds_one_row_and_each_probe_and_is_never_lowered() -> None:
    at_own_site = spec({"all": [gate("late"), gate("late", 3.0)]}, layers=[3], phase="decode")
    steering = resolved(at_own_site)
    assert contents_of(steering, lowers=True) == contents_of(steering, lowers=False)
    assert all(not phase.probes for phase in placed(steering, lowers=True))
    alone = placed(resolved(spec(gate("late"), layers=[3], phase="decode")), lowers=True)
    assert [len(phase.probes) for phase in alone] == [0, 1]  # which one alone is
    contents = contents_of(resolved(spec({"all": THREE})), lowers=True)
    assert (len(contents.rows), len(contents.probes)) == (1, 3)


def test_receipts_name_every_probe_of_a_joint_gate_once() -> None:
    given = spec({"all": [gate(), gate("sad"), gate(threshold=2.0)]})
    assert [origin.name for origin in resolved(given).probes] == ["angry", "sad"]


def test_a_monitor_leaves_what_stands_behind_a_gate_of_several_alone() -> None:
    own = ResolvedGate.of(PROBES["angry"].vector, 0.5, 1.0, label=MONITOR_LABEL)
    limits = GateLimits(count=3, probe_sites=SITES, monitor=OwnGate(own.digest, own.site))
    model = ModelSites(H, 6, SITES, limits)
    alone = resolved(spec({"all": THREE}), model)
    assert behind(alone, own) is alone  # also where a member equals it
    beside = behind(resolved(spec({"all": THREE}, None), model), own)
    assert [len(item.gate.members) for item in beside.decode.gated].count(1) == 1
    assert beside.decode.lane_count == 4
    beside.check_gate_count(limits, "steering")
    unread = GateLimits(3, SITES - {own.site}, monitor=OwnGate(own.digest, own.site))
    found = refused(spec({"all": THREE}), ModelSites(H, 6, SITES, unread))
    assert "no probe can be read at post_block:1 here" in found.message


def test_a_spec_with_joint_gates_dumps_to_json_that_reads_back_to_it() -> None:
    inline = {**gate(), "probe": PROBES["angry"]}
    given = Steering.parse(spec({"all": [inline, gate("sad")]}, {"any": THREE}, gate(), None))
    assert Steering.parse(given.model_dump_json()) == given
    assert Steering.parse(given.model_dump()) == given


MIXED = resolved(spec({"all": THREE}, gate("late", hard=True), {"any": [gate("sad"), gate()]}, layers=[4]))


def test_joint_gates_come_back_bit_for_bit() -> None:
    wire = encode(MIXED)
    back = decode(copy.deepcopy(wire), BY_DIGEST)
    assert back == MIXED
    assert encode(back) == wire
    assert [len(entry) for entry in wire["gates"]].count(2) == 2


PLACE = next(place for place, entry in enumerate(encode(MIXED)["gates"]) if entry[0] == "all")
MALFORMED: dict[str, tuple[list[Any], Any, str]] = {
    "no join": ([0], "both", "[0]"),
    "join is a number": ([0], 1, "[0]"),
    "members are no list": ([1], 3, "[1]"),
    "one member": ([1], [[0, 1.0, 1.0, False, ""]], "[1]"),
    "seventeen": ([1], [[0, 1.0, 1.0, False, ""]] * 17, "[1]"),
    "twice the same": ([1], [[0, 1.0, 1.0, False, ""]] * 2, "[1]"),
    "nested": ([1, 1], ["all", []], "[1][1]"),
    "probe out of range": ([1, 1, 0], 99, "[1][1][0]"),
    "invert is a number": ([1, 2, 3], 1, "[1][2][3]"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_joint_gate_on_the_wire_is_refused_where_the_fault_stands(case: str) -> None:
    path, value, field = MALFORMED[case]
    wire: Any = copy.deepcopy(encode(MIXED))
    entry = wire["gates"][PLACE]
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    with pytest.raises(SteeringError) as refusal:
        decode(wire, BY_DIGEST)
    assert refusal.value.field == f"wire.gates[{PLACE}]{field}"
