"""Between processes: what is sent comes back the same, and what is malformed is refused whoever sent it."""

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.program.codec import decode, encode
from trimtab.sites import HookPoint, ModelSites, Phase, Site
from trimtab.spec import Steering
from trimtab.vectors import SteeringVector

H = 4
MODEL = ModelSites(H, 4, frozenset(Site(layer, hook) for layer in range(4) for hook in HookPoint))
CALM = SteeringVector({Site(layer, HookPoint.POST_BLOCK): [layer + 1.0] * H for layer in (0, 1, 2)})
NAMES = {"calm": CALM}
BY_DIGEST = {CALM.digest: CALM}
INLINE = {"mlp_in": {"3": [1.0, -2.0, 0.25, 1e-30]}, "post_block": {"1": [0.1] * H}}


def resolved(*steps: dict[str, Any]) -> ResolvedSteering:
    return Steering.parse({"interventions": [{"kind": "add"} | step for step in steps]}).resolve(NAMES, MODEL)


MIXED = resolved(
    {"vector": "calm", "scale": 0.3},
    {"vector": "calm", "layers": [2], "phase": "decode"},
    {"vector": INLINE, "scale": -2},
    {"vector": {"post_block": {"0": [1.0] * H}}, "phase": "prefill"},
)


def through_msgpack(value: Any) -> Any:
    """What msgpack makes of it: lists of tuples, and a refusal of every type that it does not have."""
    if isinstance(value, dict):
        return {through_msgpack(key): through_msgpack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [through_msgpack(item) for item in value]
    assert value is None or type(value) in (bool, int, float, str, bytes), f"{type(value)} is no msgpack type"
    return value


def test_msgspec_carries_the_wire_form() -> None:
    msgspec = pytest.importorskip("msgspec")  # what vLLM speaks between its processes
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(BASE)) == through_msgpack(BASE)


@pytest.mark.parametrize(
    "steering",
    [
        MIXED,
        resolved({"vector": "calm"}),
        resolved({"vector": INLINE, "phase": "decode"}),
        resolved({"vector": "calm", "scale": 0}),
    ],
)
def test_steering_comes_back_bit_for_bit(steering: ResolvedSteering) -> None:
    back = decode(through_msgpack(encode(steering)), BY_DIGEST)
    assert back == steering
    for program, original in ((back.prefill, steering.prefill), (back.decode, steering.decode)):
        assert (program.row_key, program.coefficient) == (original.row_key, original.coefficient)
        if program.terms:
            assert program.row(program.sites).tobytes() == original.row(original.sites).tobytes()
    assert encode(back) == encode(steering)  # a worker may pass it on


def test_registered_vectors_travel_by_name_and_inline_ones_once() -> None:
    steering = resolved({"vector": "calm"}, {"vector": INLINE, "scale": 2}, {"vector": INLINE, "phase": "decode"})
    wire = encode(steering)
    by_name = [entry for entry in wire["vectors"] if "name" in entry]
    inline = [entry for entry in wire["vectors"] if "data" in entry]
    assert by_name == [{"name": "calm", "digest": CALM.digest, "layers": None}]
    assert [len(entry["data"]) for entry in inline] == [2 * H * 4]


def test_an_inline_copy_of_a_registered_vector_travels_by_name() -> None:
    copy_of_it = SteeringVector(dict(CALM.directions))
    wire = encode(resolved({"vector": copy_of_it}, {"vector": "calm", "scale": 2}))
    assert [entry.get("name") for entry in wire["vectors"]] == ["calm"]


def test_a_vector_that_this_process_does_not_hold_is_refused_by_name() -> None:
    with pytest.raises(SteeringError, match=r"wire\.vectors\[0\]\.digest: vector 'calm' .* is not registered"):
        decode(encode(resolved({"vector": "calm"})), {})


def test_content_is_named_by_what_it_is_and_not_by_what_the_sender_says() -> None:
    wire = encode(resolved({"vector": INLINE}))
    wire["vectors"][0]["data"] = np.ones(2 * H, "<f4").tobytes()
    assert decode(wire, {}).identity("decode") != resolved({"vector": INLINE}).identity("decode")


BASE = encode(MIXED)
NAMED = next(i for i, entry in enumerate(BASE["vectors"]) if entry.get("layers"))
RAW = next(i for i, entry in enumerate(BASE["vectors"]) if len(entry.get("sites", ())) == 2)
MALFORMED: dict[str, tuple[list[Any], Any, str]] = {
    "no object": ([], [], "wire"),
    "text": ([], "wire", "wire"),
    "unknown version": (["version"], 1, "wire.version"),
    "true as version": (["version"], True, "wire.version"),
    "unknown key": (["more"], 1, "wire"),
    "vectors is no list": (["vectors"], {}, "wire.vectors"),
    "vector is no object": (["vectors", RAW], b"", f"wire.vectors[{RAW}]"),
    "vector has another key": (["vectors", RAW, "dtype"], "float64", f"wire.vectors[{RAW}]"),
    "width zero": (["vectors", RAW, "width"], 0, f"wire.vectors[{RAW}].width"),
    "width of another vector": (["vectors", RAW, "width"], 2, f"wire.vectors[{RAW}].data"),
    "width true": (["vectors", RAW, "width"], True, f"wire.vectors[{RAW}].width"),
    "a layer of 5,000 digits": (["vectors", RAW, "sites", 0, 0], 10**5000, f"wire.vectors[{RAW}].sites[0][0]"),
    "enormous width": (["vectors", RAW, "width"], 1 << 62, f"wire.vectors[{RAW}].width"),
    "data is text": (["vectors", RAW, "data"], "x" * 32, f"wire.vectors[{RAW}].data"),
    "data too short": (["vectors", RAW, "data"], b"x" * 31, f"wire.vectors[{RAW}].data"),
    "data not finite": (["vectors", RAW, "data"], b"\xff" * 32, f"wire.vectors[{RAW}]"),
    "no sites": (["vectors", RAW, "sites"], [], f"wire.vectors[{RAW}].data"),
    "sites twice": (["vectors", RAW, "sites"], [[1, "mlp_in"]] * 2, f"wire.vectors[{RAW}]"),
    "unknown hook": (["vectors", RAW, "sites", 1], [1, "mlp"], f"wire.vectors[{RAW}].sites[1]"),
    "hook is a list": (["vectors", RAW, "sites", 1], [1, []], f"wire.vectors[{RAW}].sites[1]"),
    "negative layer": (["vectors", RAW, "sites", 1], [-1, "mlp_in"], f"wire.vectors[{RAW}].sites[1][0]"),
    "site of one": (["vectors", RAW, "sites", 1], [1], f"wire.vectors[{RAW}].sites[1]"),
    "name is bytes": (["vectors", NAMED, "name"], b"calm", f"wire.vectors[{NAMED}].name"),
    "digest is text": (["vectors", NAMED, "digest"], "calm", f"wire.vectors[{NAMED}].digest"),
    "digest is a list": (["vectors", NAMED, "digest"], [], f"wire.vectors[{NAMED}].digest"),
    "other digest": (["vectors", NAMED, "digest"], b"\0" * 32, f"wire.vectors[{NAMED}].digest"),
    "layers is a number": (["vectors", NAMED, "layers"], 2, f"wire.vectors[{NAMED}].layers"),
    "layer is text": (["vectors", NAMED, "layers"], ["2"], f"wire.vectors[{NAMED}].layers[0]"),
    "layer it lacks": (["vectors", NAMED, "layers"], [3], f"wire.vectors[{NAMED}].layers"),
    "no layers": (["vectors", NAMED, "layers"], [], f"wire.vectors[{NAMED}].layers"),
    "programs are no list": (["programs"], {}, "wire.programs"),
    "one program": (["programs"], [[]], "wire.programs"),
    "three programs": (["programs"], [[]] * 3, "wire.programs"),
    "program is no list": (["programs", 1], 0, "wire.programs[1]"),
    "entry is no pair": (["programs", 1, 0], 0, "wire.programs[1][0]"),
    "gate without gates": (["programs", 1, 0], [0, 1.0, 0], "wire.programs[1][0][2]"),
    "index out of range": (["programs", 1, 0], [9, 1.0], "wire.programs[1][0][0]"),
    "negative index": (["programs", 1, 0], [-1, 1.0], "wire.programs[1][0][0]"),
    "index true": (["programs", 1, 0], [True, 1.0], "wire.programs[1][0][0]"),
    "scale true": (["programs", 1, 0], [0, True], "wire.programs[1][0][1]"),
    "scale NaN": (["programs", 1, 0], [0, float("nan")], "wire.programs[1][0][1]"),
    "scale huge": (["programs", 1, 0], [0, 10**400], "wire.programs[1][0][1]"),
    "scale text": (["programs", 1, 0], [0, "1"], "wire.programs[1][0][1]"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_wire_form_is_refused_where_the_fault_stands(case: str) -> None:
    path, value, field = MALFORMED[case]
    wire: Any = copy.deepcopy(BASE)
    if path:
        place = wire
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    else:
        wire = value
    with pytest.raises(SteeringError) as refusal:
        decode(wire, BY_DIGEST)
    assert refusal.value.field == field


def test_values_out_of_range_on_the_wire_are_refused() -> None:
    wire = copy.deepcopy(BASE)
    wire["programs"][1][0][1] = 1e6
    with pytest.raises(SteeringError, match=r"wire\.programs\[1\]: values reach .* more than the 65504"):
        decode(wire, BY_DIGEST)


def test_vectors_of_two_widths_on_the_wire_are_refused() -> None:
    wire = copy.deepcopy(BASE)
    wire["vectors"][RAW] |= {"width": 2, "data": b"\0" * 16}
    with pytest.raises(SteeringError, match=r"wire\.vectors: the vectors have different widths"):
        decode(wire, BY_DIGEST)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "sites", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_junk_anywhere_is_refused_or_harmless(data: st.DataObject) -> None:
    wire: Any = copy.deepcopy(BASE)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []:
            places.append((node, key))
            walk(node[key])

    walk(wire)
    node, key = data.draw(st.sampled_from(places))
    node[key] = data.draw(junk)
    try:
        back = decode(wire, BY_DIGEST)
    except SteeringError:
        return
    for program in (back.prefill, back.decode):
        assert program is not None
        if program.terms:
            assert np.isfinite(program.row(program.sites)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_views_are_of_numbers_that_no_one_can_write_to(dtype: str) -> None:
    bits = np.ones(H, np.float32).view("<u2")[1::2] if dtype == "bfloat16" else np.ones(H, dtype)
    body = {"dtype": dtype, "shape": [1, H], "layer_indices": [0], "data": bits.tobytes()}
    sent = encode(resolved({"vector": {"post_block": body}}), views=True)["vectors"][0]["data"]
    assert isinstance(sent, memoryview)
    assert sent.readonly


def test_numbers_that_their_owner_may_still_change_are_copied() -> None:
    mine = np.ones((1, H), np.float32)
    vector = SteeringVector.from_block([Site(0, HookPoint.POST_BLOCK)], mine)
    steering = resolved({"vector": vector})
    wire = encode(steering, views=True)
    mine[:] = 2.0
    back = decode(through_msgpack(wire), {})
    assert back.identity(Phase.DECODE) == steering.identity(Phase.DECODE)
