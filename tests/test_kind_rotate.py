"""`rotate`: its formula in float64 against what comes of a spec, its properties, refusals, identity and the wire."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinds_cases import HERE, LAYERS, SITES, H, Row, done, resolve, unit, vector
from kinds_device import served
from trimtab.errors import SteeringError
from trimtab.program.codec import decode, encode
from trimtab.sites import HookPoint, ModelSites, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

V, P = vector(1, scale=30.0), vector(2, scale=1e-3)
A = unit(V.directions[HERE])
B = unit(P.directions[HERE])
B = (B - (B @ A) * A) / np.linalg.norm(B - (B @ A) * A)

streams = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=H) * 20)
angles = st.floats(-720, 720, width=32)


def rotate(**said: Any) -> dict[str, Any]:
    return {"kind": "rotate", "vector": V, "plane": P, **said}


def left(stream: Row, *steps: dict) -> Row:
    return done(resolve(*steps).decode, stream)


def turned(x: Row, degrees: float) -> Row:
    """x with its part in the plane turned: a rotation matrix in an orthonormal basis of the plane."""
    basis = np.stack([A, B])
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x - (basis @ x) @ basis + (np.array([[cosine, -sine], [sine, cosine]]) @ basis @ x) @ basis


@given(streams, angles)
def test_by_turns_the_part_in_the_plane(x: Row, degrees: float) -> None:
    np.testing.assert_allclose(left(x, rotate(by=degrees)), turned(x, degrees), atol=1e-4)


@given(streams, angles)
def test_to_turns_it_to_one_angle_whatever_it_had(x: Row, degrees: float) -> None:
    length = np.hypot(x @ A, x @ B)
    ray = math.cos(math.radians(degrees)) * A + math.sin(math.radians(degrees)) * B
    np.testing.assert_allclose(left(x, rotate(to=degrees)), x - (x @ A) * A - (x @ B) * B + length * ray, atol=1e-4)


@given(streams, angles, st.sampled_from(["by", "to"]))
def test_adaptive_turns_tokens_that_lie_on_the_side_of_the_vector(x: Row, degrees: float, how: str) -> None:
    found = left(x, rotate(adaptive=True, **{how: degrees}))
    always = left(x, rotate(**{how: degrees}))
    np.testing.assert_allclose(found, always if x @ A > 0 else x, atol=1e-9)


@given(streams, angles, st.sampled_from(["by", "to"]))
def test_lengths_are_kept_and_what_is_outside_of_the_plane_stays(x: Row, degrees: float, how: str) -> None:
    found = left(x, rotate(**{how: degrees}))
    assert np.hypot(found @ A, found @ B) == pytest.approx(np.hypot(x @ A, x @ B), abs=1e-4)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(x), abs=1e-4)
    outside = [row - (row @ A) * A - (row @ B) * B for row in (x, found)]
    np.testing.assert_allclose(*outside, atol=1e-4)


@given(streams, angles)
def test_a_turn_is_undone_by_its_opposite_at_the_next_site(x: Row, degrees: float) -> None:
    there = Site(3, HookPoint.POST_BLOCK)
    program = resolve(rotate(by=degrees), rotate(by=-degrees, layers=[3])).decode
    np.testing.assert_allclose(done(program, done(program, x), there), x, atol=1e-4)


@pytest.mark.parametrize("degrees", [0, 360, -720, 1e-45])
def test_a_turn_by_whole_circles_is_nothing(degrees: float) -> None:
    assert resolve(rotate(by=degrees)).decode.identity == ""


def test_whole_quarters_are_exact() -> None:
    told = {
        degrees: [slot.at[HERE].own for slot in resolve(rotate(by=degrees)).decode.slots] for degrees in (90, -270, 180)
    }
    assert told[90] == told[-270]
    assert {own[:2] for own in told[90]} == {(-1.0, -1.0), (-1.0, 1.0)}
    assert {own[:2] for own in told[180]} == {(-2.0, 0.0)}


@given(st.floats(0, 2 * math.pi), st.sampled_from([1e-3, 1e-2, 1.0]))
def test_the_second_direction_is_orthogonal_however_close_the_plane_was_given(at: float, apart: float) -> None:
    """In float64: its row is rounded once."""
    near = SteeringVector({HERE: V.directions[HERE] + apart * 30 * math.cos(at) * P.directions[HERE] * 1e3})
    for slot in resolve(rotate(plane=near, by=45)).decode.slots:
        (row,) = slot.read.values((HERE,))
        assert np.linalg.norm(row) == pytest.approx(1.0, abs=1e-12)
        (other,) = slot.second.values((HERE,))
        assert abs(row @ other) < 1e-9


@given(st.permutations(range(4)))
def test_the_order_of_interventions_changes_nothing_to_the_bit(order: list[int]) -> None:
    steps = [rotate(by=30), rotate(to=10, adaptive=True), {"kind": "ablate", "vector": V}, rotate(by=30)]
    one, other = resolve(*steps), resolve(*(steps[index] for index in order))
    assert one.decode == other.decode
    assert one.identity("decode") == other.identity("decode")


CHANGES = [
    {"by": 31}, {"by": -30}, {"by": None, "to": 30}, {"adaptive": True}, {"vector": P, "plane": V},
    {"layers": [3]}, {"phase": "decode"}, {"gate": {"probe": {"post_block": {"1": [1.0] * H}}, "threshold": 0.5}},
    {"plane": vector(3)},
]  # fmt: skip


def test_what_is_turned_differently_has_another_name() -> None:
    specs = [rotate(by=30), *({**rotate(by=30), **change} for change in CHANGES)]
    specs = [{key: value for key, value in spec.items() if value is not None} for spec in specs]
    found = [resolve(spec) for spec in specs]
    assert len({(one.identity("prefill"), one.identity("decode")) for one in found}) == len(specs)
    assert resolve(rotate(by=390)).decode == resolve(rotate(by=30)).decode


@pytest.mark.parametrize("said", [{"by": 30}, {"to": -100.5, "adaptive": True}, {"by": 7, "layers": [1, 2, 4]}])
@pytest.mark.parametrize("named", [False, True])
def test_it_travels(said: dict[str, Any], named: bool) -> None:
    names = {"a": V, "b": P} if named else {}
    step = rotate(**said) | ({"vector": "a", "plane": "b"} if named else {})
    gated = step | {"gate": {"probe": {"post_block": {"1": [1.0] * H}}, "threshold": 0.5}, "to": 90}
    gated.pop("by", None)
    steering = resolve(step, gated | {"layers": [4]}, names=names)
    found = decode(encode(steering), {vector.digest: vector for vector in names.values()})
    assert found == steering
    assert found.identity("decode") == steering.identity("decode")
    assert [slot.digest for slot in found.slots] == [slot.digest for slot in steering.slots]


def test_a_wire_form_whose_second_score_nobody_reads_is_refused() -> None:
    wire = encode(resolve(rotate(by=30)))
    wire["acting"] = [acting[:1] for acting in wire["acting"]]
    with pytest.raises(SteeringError, match=r"wire\.programs\[0\]|second score"):
        decode(wire, {})


REFUSED = {
    "no angle": ({}, "interventions[0]", "has no angle"),
    "two angles": ({"by": 1, "to": 1}, "interventions[0].to", "give one of them"),
    "no number": ({"by": "90"}, "interventions[0].by", "want a number"),
    "infinite": ({"by": math.inf}, "interventions[0].by", "finite"),
    "adaptive is no flag": ({"by": 1, "adaptive": 1}, "interventions[0].adaptive", "want true or false"),
    "parallel": ({"by": 1, "plane": V * -2}, "interventions[0].plane", "parallel to `vector` at post_block:2"),
    "zero": ({"by": 1, "plane": SteeringVector({HERE: [0.0] * H})}, "interventions[0].plane", "zero"),
    "zero vector": ({"by": 1, "vector": SteeringVector({HERE: [0.0] * H})}, "interventions[0].vector", "zero"),
    "elsewhere": (
        {"by": 1, "plane": vector(2, (Site(3, HookPoint.POST_BLOCK),))}, "interventions[0].plane", "post_block:3",
    ),
    "another width": ({"by": 1, "plane": SteeringVector({HERE: [1.0, 2.0]})}, "interventions[0].plane", "width 2"),
    "unknown name": ({"by": 1, "plane": "nobody"}, "interventions[0].plane", "no vector 'nobody'"),
    "no plane": ({"by": 1, "plane": None}, "interventions[0].plane", "want"),
}  # fmt: skip


@pytest.mark.parametrize(("said", "field", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_field(said: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(SteeringError) as caught:
        resolve(rotate(**said))
    assert caught.value.field == field
    assert message in caught.value.message


@given(st.lists(streams, min_size=1, max_size=5), angles, st.sampled_from(["by", "to"]), st.booleans())
def test_the_device_turns_each_token(rows: list[Row], degrees: float, how: str, adaptive: bool) -> None:
    """Beside slots of a set and another turn, whose places among the slots differ from request to request."""
    steps = [rotate(adaptive=adaptive, **{how: degrees}), {"kind": "clamp", "vector": vector(5), "max": -1.0}]
    steps.append({"kind": "rotate", "vector": vector(6), "plane": vector(7), "by": 50})
    x = np.stack(rows).astype(np.float32)
    expected = [left(row.astype(np.float64), *steps) for row in x]
    np.testing.assert_allclose(served(x, *steps), expected, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_directions_keep_lengths_to_the_rounding_of_the_stream(dtype: torch.dtype) -> None:
    random = np.random.default_rng(4)
    v, p, x = random.normal(size=512), random.normal(size=512), random.normal(size=(20, 512)).astype(np.float32) * 9
    x = torch.from_numpy(x).to(dtype).float().numpy()
    found = served(
        x,
        rotate(vector=SteeringVector({HERE: v}), plane=SteeringVector({HERE: p}), to=120),
        dtype=dtype,
        model=ModelSites(512, LAYERS, SITES, slots=SlotLimits(2, SITES, frozenset({"rotate"}))),
    )
    lengths = np.linalg.norm(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), lengths, rtol=3e-4)
    a = v / np.linalg.norm(v)
    b = p - (p @ a) * a
    b /= np.linalg.norm(b)
    at = np.degrees(np.arctan2(found @ b, found @ a))
    np.testing.assert_allclose(at, 120, atol=1.0)


def test_limits() -> None:
    """Two slots at each of its sites."""
    for count, kinds, field in ((1, {"rotate"}, "interventions"), (4, {"ablate"}, "interventions[0].kind")):
        model = ModelSites(H, LAYERS, SITES, slots=SlotLimits(count, SITES, frozenset(kinds)))
        with pytest.raises(SteeringError) as caught:
            resolve(rotate(by=3), model=model)
        assert caught.value.field == field
    model = ModelSites(H, LAYERS, SITES, slots=SlotLimits(2, SITES, frozenset({"rotate"})))
    assert len(resolve(rotate(by=3), model=model).decode.slots) == 2


def test_reports_name_both_vectors() -> None:
    found = resolve(rotate(by=3) | {"vector": "calm", "plane": "main"}, names={"calm": V, "main": P})
    assert [(origin.name, origin.digest) for origin in found.vectors] == [("calm", V.digest), ("main", P.digest)]
    assert Steering.parse({"interventions": [rotate(by=3)]}).model_dump(mode="json")["interventions"][0]["by"] == 3
