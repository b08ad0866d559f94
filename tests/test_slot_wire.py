"""Slots between processes: what is sent comes back the same, and what is malformed is refused whoever sent it."""

import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinds_cases import HERE, SITES, H, resolve, vector
from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, PhaseProgram, ResolvedSteering, Slot
from trimtab.program.codec import decode, encode
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.slots import Part
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector

msgspec = pytest.importorskip("msgspec")  # what vLLM speaks between its processes

CALM, DEEP = vector(1), vector(2, (HERE, Site(4, HookPoint.MLP_IN), Site(5, HookPoint.POST_BLOCK)))
NAMES = {"calm": CALM, "deep": DEEP}
BY_DIGEST = {one.digest: one for one in NAMES.values()}
GATE = {"probe": {"mlp_in": {"1": [1.0] * H}}, "threshold": 0.5}


def through_msgpack(wire: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(wire))


MIXED = resolve(
    {"kind": "clamp", "vector": "deep", "min": {"2": -1, "4": 0.0, "5": -3}, "strength": 0.5},
    {"kind": "ablate", "vector": "calm", "layers": [0, 3], "hooks": ["pre_attn", "post_block"], "phase": "decode"},
    {"kind": "swap", "vector": vector(5), "to": "calm", "gate": GATE},
    {"kind": "scale", "vector": vector(6), "factor": -2, "gate": {**GATE, "hard": True}},
    {"kind": "ablate", "vector": {"post_block": {"0": [1.0] * H}}, "layers": list(range(6)), "phase": "prefill"},
    {"kind": "add", "vector": "calm", "scale": 0.3},
    {"kind": "add", "vector": "deep", "hooks": ["mlp_in"], "gate": GATE},
    names=NAMES,
)
MONITORED = behind(MIXED, ResolvedGate.of(SteeringVector({Site(3, HookPoint.POST_ATTN): [1.0] * H}), 0.5, 2.0))
NOTHING = resolve({"kind": "scale", "vector": "calm", "factor": 1}, names=NAMES)


@pytest.mark.parametrize("steering", [MIXED, MONITORED, NOTHING])
def test_slots_come_back_bit_for_bit(steering: ResolvedSteering) -> None:
    wire = encode(steering)
    back = decode(through_msgpack(wire), BY_DIGEST)
    assert back == steering
    assert encode(back) == wire  # a worker may pass it on
    for mine, theirs in zip(steering.programs, back.programs, strict=True):
        assert (mine.row_key, mine.identity, mine.sites) == (theirs.row_key, theirs.identity, theirs.sites)
        for one, other in zip(mine.slots, theirs.slots, strict=True):
            assert (one.digest, one.numbers, one.gate) == (other.digest, other.numbers, other.gate)
            for way, again in zip(one.directions, other.directions, strict=True):
                assert way.row_key == again.row_key
                assert way.row(way.sites).tobytes() == again.row(way.sites).tobytes()


def test_what_no_kind_says_yet_comes_back_too() -> None:
    """Weights, lengths as they are, a bias, and slots that read nothing: kinds to come need them."""
    raw, half = Direction((Part(CALM, 1.0, unit=False),)), Direction((Part(CALM, 0.5), Part(vector(7), -2.0)))
    numbers = ((HERE, Numbers.of(0.25, -3.0, -math.inf, 2.0)),)
    slots = [Slot("clip", raw, half, numbers), Slot("clip", None, raw, numbers), Slot("clip", half, None, numbers)]
    steering = ResolvedSteering((PhaseProgram.of([], slots), PhaseProgram.of([], slots[:2])))
    assert decode(through_msgpack(encode(steering)), {}) == steering


def test_a_spread_vector_travels_as_one_row_or_as_its_name() -> None:
    places = {"layers": [0, 1, 2], "hooks": ["mlp_in"]}
    steps = [{"kind": "ablate", "vector": source, **places} for source in ("calm", CALM)]
    named, inline = (encode(resolve(step, names=NAMES)) for step in steps)
    assert named["vectors"] == [{"name": "calm", "digest": CALM.digest, **places}]
    (content,) = inline["vectors"]
    assert (len(content["data"]), len(content["sites"]), content["spread"]) == (4 * H, 3, True)
    (found,) = decode(through_msgpack(inline), {}).decode.slots
    assert found.read is not None
    assert found.read.is_spread
    assert encode(resolve(steps[1]), views=True)["vectors"][0]["data"] == content["data"]


def test_each_direction_and_slot_travels_once() -> None:
    wire = encode(
        resolve({"kind": "swap", "vector": "calm", "to": vector(3)}, {"kind": "ablate", "vector": "calm"}, names=NAMES)
    )
    assert [len(wire[key]) for key in ("vectors", "directions", "slots")] == [2, 2, 2]
    assert wire["acting"][0] == wire["acting"][1]


BASE = encode(MIXED)
NAMED = next(i for i, entry in enumerate(BASE["vectors"]) if "hooks" in entry and entry["layers"])
SPREAD = next(i for i, entry in enumerate(BASE["vectors"]) if "spread" in entry)
CLAMP = next(i for i, entry in enumerate(BASE["slots"]) if len(entry[3]) == 3)
SWAP = next(i for i, entry in enumerate(BASE["slots"]) if entry[2] is not None)
NUMBERS = ["slots", CLAMP, 3, 0, 1]
WHERE = f"wire.slots[{CLAMP}]"
INFINITY, NAN = float("inf"), float("nan")

MALFORMED: dict[str, tuple[list[Any], Any, str]] = {
    "hooks are no list": (["vectors", NAMED, "hooks"], "mlp_in", f"wire.vectors[{NAMED}].hooks"),
    "no hooks": (["vectors", NAMED, "hooks"], [], f"wire.vectors[{NAMED}].hooks"),
    "unknown hook": (["vectors", NAMED, "hooks"], ["mlp"], f"wire.vectors[{NAMED}].hooks[0]"),
    "hook is a list": (["vectors", NAMED, "hooks"], [[]], f"wire.vectors[{NAMED}].hooks[0]"),
    "layers without end": (["vectors", NAMED, "layers"], [0] * 2000, f"wire.vectors[{NAMED}].layers"),
    "spread is a number": (["vectors", SPREAD, "spread"], 1, f"wire.vectors[{SPREAD}].spread"),
    "spread over one site twice": (["vectors", SPREAD, "sites", 1], [0, "post_block"], f"wire.vectors[{SPREAD}]"),
    "not spread after all": (["vectors", SPREAD, "spread"], False, f"wire.vectors[{SPREAD}].data"),
    "directions are no list": (["directions"], {}, "wire.directions"),
    "direction is no list": (["directions", 0], {}, "wire.directions[0]"),
    "direction of nothing": (["directions", 0], [], "wire.directions[0]"),
    "direction of too many parts": (["directions", 0], [[0, 1.0, True]] * 9, "wire.directions[0]"),
    "part of two": (["directions", 0, 0], [0, 1.0], "wire.directions[0][0]"),
    "part of no vector": (["directions", 0, 0, 0], 99, "wire.directions[0][0][0]"),
    "weight NaN": (["directions", 0, 0, 1], NAN, "wire.directions[0][0][1]"),
    "weight true": (["directions", 0, 0, 1], True, "wire.directions[0][0][1]"),
    "weight huge": (["directions", 0, 0, 1], 1e30, "wire.directions[0][0][1]"),
    "weight zero": (["directions", 0, 0, 1], 0.0, "wire.slots[0]"),
    "unit is a number": (["directions", 0, 0, 2], 1, "wire.directions[0][0][2]"),
    "slots are no list": (["slots"], 0, "wire.slots"),
    "slot of four": (["slots", 0], ["clip", 0, None, []], "wire.slots[0]"),
    "unknown response": (["slots", 0, 0], "clop", "wire.slots[0][0]"),
    "response is a list": (["slots", 0, 0], [], "wire.slots[0][0]"),
    "reads no direction": (["slots", 0, 1], 99, "wire.slots[0][1]"),
    "reads a truth": (["slots", 0, 1], True, "wire.slots[0][1]"),
    "writes no direction": (["slots", 0, 2], -1, "wire.slots[0][2]"),
    "neither reads nor writes": (["slots", CLAMP, 1], None, WHERE),
    "numbers are no list": (["slots", CLAMP, 3], 0, f"{WHERE}[3]"),
    "no numbers": (["slots", CLAMP, 3], [], f"{WHERE}[3]"),
    "numbers of no site": (["slots", CLAMP, 3], [[[], [0.0, 1.0, 0.0, 0.0]]], f"{WHERE}[3]"),
    "numbers without sites": (["slots", CLAMP, 3, 0], [[0.0, 1.0, 0.0, 0.0]], f"{WHERE}[3][0]"),
    "too few numbers": (NUMBERS, [0.0, 1.0, 0.0], f"{WHERE}[3][0][1]"),
    "too many numbers": (NUMBERS, [0.0] * 5, f"{WHERE}[3][0][1]"),
    "bias infinite": (NUMBERS, [INFINITY, 1.0, 0.0, 0.0], f"{WHERE}[3][0][1][0]"),
    "strength infinite": (NUMBERS, [0.0, INFINITY, 0.0, 0.0], f"{WHERE}[3][0][1][1]"),
    "strength NaN": (NUMBERS, [0.0, NAN, 0.0, 0.0], f"{WHERE}[3][0][1][1]"),
    "strength true": (NUMBERS, [0.0, True, 0.0, 0.0], f"{WHERE}[3][0][1][1]"),
    "strength text": (NUMBERS, [0.0, "1", 0.0, 0.0], f"{WHERE}[3][0][1][1]"),
    "strength without end": (NUMBERS, [0.0, 10**400, 0.0, 0.0], f"{WHERE}[3][0][1][1]"),
    "bound beyond every dtype": (NUMBERS, [0.0, 1.0, -1e5, 0.0], f"{WHERE}[3][0][1][2]"),
    "bounds the wrong way round": (NUMBERS, [0.0, 1.0, 1.0, 0.0], f"{WHERE}[3][0][1]"),
    "a least bound that is infinite": (NUMBERS, [0.0, 1.0, INFINITY, INFINITY], f"{WHERE}[3][0][1]"),
    "a largest bound that is minus infinity": (NUMBERS, [0.0, 1.0, -INFINITY, -INFINITY], f"{WHERE}[3][0][1]"),
    "a site twice": (["slots", CLAMP, 3, 0, 0], [[4, "mlp_in"], [4, "mlp_in"]], f"{WHERE}[3][0][0][1]"),
    "a site, and all of them": (["slots", CLAMP, 3, 1, 0], None, f"{WHERE}[3][1][0][0]"),
    "a site that its direction lacks": (["slots", CLAMP, 3, 0, 0], [[3, "mlp_in"]], WHERE),
    "no site": (["slots", CLAMP, 3, 0, 0], [[3, "mlp"]], f"{WHERE}[3][0][0][0]"),
    "gate that is not there": (["slots", CLAMP, 4], 99, f"{WHERE}[4]"),
    "acting is no list": (["acting"], 0, "wire.acting"),
    "one phase alone": (["acting"], [[0]], "wire.acting"),
    "acting in a phase is no list": (["acting", 1], 0, "wire.acting[1]"),
    "a slot that is not there": (["acting", 1, 0], 99, "wire.acting[1][0]"),
    "slots without end": (["acting", 1], [0] * 1000, "wire.acting[1]"),
    "a version before": (["version"], 2, "wire.version"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_slot_is_refused_where_the_fault_stands(case: str) -> None:
    path, value, field = MALFORMED[case]
    wire: Any = through_msgpack(BASE)
    place = wire
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SteeringError) as refusal:
        decode(wire, BY_DIGEST)
    assert refusal.value.field == field


def test_a_slot_before_the_site_of_its_gate_is_refused() -> None:
    wire = through_msgpack(BASE)
    slots = {slot.digest: slot for slot in MIXED.slots}.values()
    early = next(i for i, slot in enumerate(slots) if Site(0, HookPoint.PRE_ATTN) in slot.at)
    wire["slots"][early][4] = 0
    with pytest.raises(SteeringError, match=r"after the vector has acted at") as refusal:
        decode(wire, BY_DIGEST)
    assert refusal.value.field == f"wire.slots[{early}][4]"


def test_slots_that_contradict_each_other_are_refused_on_the_wire_too() -> None:
    wire = through_msgpack(encode(resolve({"kind": "clamp", "vector": "calm", "min": 1, "max": 2}, names=NAMES)))
    other = copy.deepcopy(wire["slots"][0])
    other[3][0][1] = [0.0, 1.0, 3.0, 4.0]
    wire["slots"].append(other)
    wire["acting"] = [[0], [0, 1]]
    with pytest.raises(SteeringError, match=r"wire\.programs\[1\]: .* ask for different things"):
        decode(wire, BY_DIGEST)


def test_parts_of_other_sites_or_widths_are_refused() -> None:
    wire = through_msgpack(BASE)
    place, other = next((i, way) for i, way in enumerate(wire["directions"]) if len(way) == 2)
    one_site = {part[0] for part in other}
    wire["directions"][place][1][0] = next(i for i in range(len(wire["vectors"])) if i not in one_site)
    with pytest.raises(SteeringError) as refusal:
        decode(wire, BY_DIGEST)
    assert refusal.value.field in (f"wire.directions[{place}][1][0]", f"wire.slots[{SWAP}][3]")


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "spread"]), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_junk_anywhere_is_refused_or_harmless(data: st.DataObject) -> None:
    wire: Any = through_msgpack(BASE)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []:
            places.append((node, key))
            walk(node[key])

    walk({key: wire[key] for key in ("directions", "slots", "acting", "vectors", "gates")})
    node, key = data.draw(st.sampled_from(places))
    node[key] = data.draw(junk)
    try:
        back = decode(wire, BY_DIGEST)
    except SteeringError:
        return
    sites = tuple(SITES)
    for program in back.programs:
        for slot in program.slots:
            assert all(np.isfinite(way.row(sites)).all() for way in slot.directions)
            assert all(np.isfinite(numbers.own[0]) for _, numbers in slot.numbers)
