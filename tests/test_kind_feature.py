"""`feature`: activations of sparse autoencoders in float64, what is made of them, digits, refusals, and the wire."""

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
from trimtab.vectors import Dictionary, DictionaryRow, SteeringVector

W, D = vector(1), vector(2, scale=3.0)
w, d = (one.directions[HERE].astype(np.float64) for one in (W, D))
seeds = st.integers(0, 2**32 - 1)
numbers = st.floats(-4, 4, width=32)
RELU = {"architecture": "relu"}
JUMP = {"architecture": "jumprelu", "threshold": 0.75}
GATED = {"architecture": "gated", "bias": 0.5, "gate_bias": -0.25, "gain": 1.5}


def feature(**said: Any) -> dict[str, Any]:
    return {"kind": "feature", "encoder": W, "decoder": D, **said}


def stream(seed: int) -> Row:
    return np.random.default_rng(seed).normal(size=H)


def left(x: Row, *steps: dict[str, Any]) -> Row:
    return done(resolve(*steps).decode, x)


def activation(x: Row, said: dict[str, Any]) -> float:
    """As papers write it, each architecture in its own words."""
    z, bias = x @ w, said.get("bias", 0.0)
    if said["architecture"] == "gated":
        return max(said["gain"] * z + bias, 0.0) if z + said["gate_bias"] > 0 else 0.0
    f = max(z + bias, 0.0)
    return f * (z + bias > said["threshold"]) if said["architecture"] == "jumprelu" else f


OF_EACH = st.one_of(
    st.fixed_dictionaries({"architecture": st.just("relu"), "bias": numbers}),
    st.fixed_dictionaries({"architecture": st.just("jumprelu"), "bias": numbers, "threshold": numbers}),
    st.fixed_dictionaries(
        {"architecture": st.just("gated"), "bias": numbers, "gate_bias": numbers,
         "gain": st.floats(0.125, 4, width=32)}
    ),
)  # fmt: skip


@given(seeds, OF_EACH, numbers, st.booleans())
def test_a_feature_is_set(seed: int, said: dict[str, Any], value: float, only: bool) -> None:
    x = stream(seed)
    f = activation(x, said)
    expected = x if only and f == 0 else x + (value - f) * d
    np.testing.assert_allclose(left(x, feature(**said, set=value, only_if_active=only)), expected, atol=1e-4)


@given(seeds, OF_EACH, numbers, numbers, st.tuples(numbers, numbers).map(sorted), st.booleans())
def test_it_is_scaled_shifted_and_bounded_in_that_order(
    seed: int, said: dict[str, Any], k: float, a: float, ends: list[float], only: bool
) -> None:
    x = stream(seed)
    f = activation(x, said)
    wanted = np.clip(k * f + a, *ends)
    step = feature(**said, scale=k, add=a, min=ends[0], max=ends[1], only_if_active=only)
    np.testing.assert_allclose(left(x, step), x if only and f == 0 else x + (wanted - f) * d, atol=1e-4)


@given(seeds, OF_EACH)
def test_set_to_its_own_value_it_changes_nothing(seed: int, said: dict[str, Any]) -> None:
    x = stream(seed)
    np.testing.assert_allclose(left(x, feature(**said, set=activation(x, said))), x, atol=1e-5)


@given(seeds, OF_EACH)
def test_what_comes_of_it_is_the_autoencoder_with_the_feature_set_and_its_error(
    seed: int, said: dict[str, Any]
) -> None:
    """Two more features and a bias of the decoder, of which nothing is told."""
    x, random = stream(seed), np.random.default_rng(seed)
    acts = np.array([activation(x, said), *np.maximum(random.normal(size=2), 0)])
    rows, bias = np.stack([d, *random.normal(size=(2, H))]), random.normal(size=H)
    error = x - (acts @ rows + bias)
    acts[0] = 2.5
    np.testing.assert_allclose(left(x, feature(**said, set=2.5)), acts @ rows + bias + error, atol=1e-4)


@pytest.mark.parametrize("said", [RELU, JUMP, GATED], ids=lambda said: said["architecture"])
def test_scaled_by_0_it_is_set_to_0_and_scaled_by_1_it_is_nothing(said: dict[str, Any]) -> None:
    assert resolve(feature(**said, scale=0)) == resolve(feature(**said, set=0))
    assert resolve(feature(**said, scale=1)).identity("decode") == ""
    assert resolve(feature(**said, add=0, only_if_active=True)).identity("decode") == ""


ONES, ALONG = SteeringVector({HERE: [1.0] + [0.0] * (H - 1)}), SteeringVector({HERE: [0.0, 1.0] + [0.0] * (H - 2)})


@pytest.mark.parametrize(("u", "fires"), [(0.75, False), (np.nextafter(np.float32(0.75), np.float32(1)), True)])
def test_at_its_threshold_exactly_a_feature_does_not_fire(u: float, fires: bool) -> None:
    x = np.zeros((1, H), np.float32)
    x[0, 0] = u
    step = feature(encoder=ONES, decoder=ALONG, **JUMP, set=4.0, only_if_active=True)
    for found in (served(x, step)[0], left(x[0].astype(np.float64), step)):
        assert found[1] == pytest.approx(4.0 - u if fires else 0.0)


def test_a_threshold_below_0_is_0() -> None:
    same = [resolve(feature(architecture="jumprelu", threshold=theta, set=1)) for theta in (-3, 0)]
    assert same[0] == same[1] == resolve(feature(**RELU, set=1))


def test_what_is_not_a_number_in_the_stream_does_not_spread() -> None:
    x = np.zeros((3, H), np.float32)
    x[:, 0] = [math.nan, math.inf, 2.0]
    found = served(x, feature(encoder=ONES, decoder=ALONG, **RELU, set=1.0, only_if_active=True))
    assert np.isfinite(found[0, 1:]).all()
    np.testing.assert_array_equal(found[2, 1], -1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_encoder_is_read_to_the_digits_of_float32(dtype: torch.dtype) -> None:
    """Beside a bias of a thousandth less than the score, whose own rounding to bfloat16 would be a hundred times that:
    what is written is the activation alone, so it is seen to the digits of float32 in every dtype."""
    width, random = 512, np.random.default_rng(3)
    row = random.normal(size=width).astype(np.float32)
    x = torch.from_numpy(random.normal(size=width).astype(np.float32) * 8).to(dtype)
    x[0] = 0.0  # what is written is all that is there
    out = np.eye(width)[0]
    exact = float(x.double().numpy() @ row.astype(np.float64))
    step = {
        "kind": "feature", "encoder": SteeringVector({HERE: row}), "decoder": SteeringVector({HERE: out}), **RELU,
        "bias": 0.001 - exact, "scale": 2,
    }  # fmt: skip
    model = ModelSites(width, LAYERS, SITES, slots=SlotLimits(2, SITES, frozenset({"feature"})))
    found = served(x[None].float().numpy(), step, dtype=dtype, model=model)[0, 0]
    u = exact + float(np.float32(0.001 - exact))
    np.testing.assert_allclose(found, u, atol=5e-5)
    rounded = x.double().numpy() @ torch.from_numpy(row).to(dtype).double().numpy()
    if dtype == torch.bfloat16:
        assert abs(rounded - exact) > 0.05  # what one row of the table would have made of it


def test_three_rows_hold_the_encoder() -> None:
    (slot,) = resolve(feature(**RELU, set=1)).decode.slots
    first, write, *others = slot.columns
    assert (len(slot.rows), write) == (4, slot.write)
    for dtype in (torch.float16, torch.bfloat16):
        stored = [torch.from_numpy(way.row((HERE,))).to(dtype).double().numpy()[0] for way in (first, *others)]
        held = sum(part / 256**place for place, part in enumerate(stored)) * first.unit
        np.testing.assert_array_equal(held, w)
    assert len({way.row_key for way in (slot.read, *slot.rows)}) == 5


@pytest.mark.parametrize("largest", [0.998, 0.99805, 0.9985, 0.999, 0.9995, 0.99951, 0.9999, 1.0, 1.998, 65504.0])
def test_the_largest_number_of_an_encoder_fits_where_its_first_digits_are_rounded_up(largest: float) -> None:
    row = np.random.default_rng(0).uniform(-0.4, 0.4, H).astype(np.float32)
    row[3] = largest
    step = feature(encoder=SteeringVector({HERE: row}), **RELU, set=2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert np.isfinite(served(np.zeros((1, H), np.float32), step, dtype=dtype)).all()
        (slot,) = resolve(step).decode.slots
        first, _, *others = slot.columns
        stored = [torch.from_numpy(way.row((HERE,))).to(dtype).double().numpy()[0] for way in (first, *others)]
        held = sum(part / 256**place for place, part in enumerate(stored)) * first.unit
        np.testing.assert_allclose(held, row, rtol=1e-7, atol=largest * 1e-9)


def test_what_differs_has_another_name() -> None:
    specs = [feature(**RELU, set=1), feature(**RELU, set=2), feature(**RELU, scale=0), feature(**RELU, min=1),
             feature(**RELU, max=1), feature(**RELU, add=1), feature(**RELU, bias=1, set=1), feature(**JUMP, set=1),
             feature(**RELU, set=1, only_if_active=True), feature(**GATED, set=1),
             feature(**{**GATED, "gain": 2.0}, set=1), feature(**RELU, set=1, encoder=D),
             feature(**RELU, set=1, decoder=W), feature(**RELU, set=1, layers=[3]),
             feature(**RELU, set=-1)]  # fmt: skip
    assert len({resolve(spec).identity("decode") for spec in specs}) == len(specs)


@given(seeds, OF_EACH, numbers)
def test_the_device_does_it_beside_other_slots(seed: int, said: dict[str, Any], value: float) -> None:
    x = np.random.default_rng(seed).normal(size=(3, H)).astype(np.float32)
    steps = [
        feature(**said, set=value),
        {"kind": "rotate", "vector": vector(5), "plane": vector(6), "by": 9},
        feature(**RELU, encoder=vector(7), min=2),
        {"kind": "ablate", "vector": vector(8)},
    ]
    rows = [row.astype(np.float64) for row in x]
    if min(abs(row @ w + said.get("bias", 0) - said.get("threshold", 0)) for row in rows) > 1e-4 and (
        "gain" not in said or min(abs(row @ w + said["gate_bias"]) for row in rows) > 1e-4
    ):
        np.testing.assert_allclose(served(x, *steps), [left(row, *steps) for row in rows], atol=1e-3)
    assert resolve(*steps) == resolve(*steps[::-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_a_set_in_the_same_program_projections_stay_where_they_are_put(dtype: torch.dtype) -> None:
    """Members of a set are read as they are stored, though other slots of the graph read more digits."""
    a = vector(8)
    along = SteeringVector({HERE: d - (d @ unit(a.directions[HERE])) * unit(a.directions[HERE])})
    x = np.random.default_rng(1).normal(size=(5, H)).astype(np.float32)
    found = served(x, feature(**RELU, decoder=along, set=2), {"kind": "ablate", "vector": a}, dtype=dtype)
    held = torch.from_numpy(unit(a.directions[HERE])).to(dtype).double().numpy()
    np.testing.assert_allclose(found @ held, 0.0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_one_row_may_be_spread_and_acts_at_each_place() -> None:
    steering = resolve(feature(**RELU, set=1, layers=[2, 4], hooks=["post_attn", "post_block"]))
    (slot,) = steering.decode.slots
    assert len(slot.sites) == 4
    assert len(slot.rows) == 4


def test_a_feature_given_twice_counts_once_and_contradictions_are_refused() -> None:
    one = feature(**RELU, set=1)
    assert resolve(one, one) == resolve(one)
    some, others = ({**one, "layers": layers} for layers in ([1, 2, 3], [3, 4]))
    x = stream(3)
    for layer in (1, 3, 4):
        site = Site(layer, HookPoint.POST_BLOCK)
        both = done(resolve(some, others).decode, x, site)
        np.testing.assert_allclose(both, done(resolve({**one, "layers": [layer]}).decode, x, site), atol=1e-9)
    gate = {"probe": {"post_block": {"1": [1.0] * H}}, "threshold": 0.5}
    for other in ({**one, "set": 2}, {**one, "gate": gate}, {**one, "bias": 0.5}, feature(**JUMP, set=1)):
        with pytest.raises(SteeringError, match=r"interventions\[[01]\] .*change one feature at post_block:2 and ask"):
            resolve(one, other)
    assert resolve(one, {**one, "gate": gate, "layers": [3]}).decode.slots  # at other places
    assert len(resolve(one, {**one, "decoder": vector(9)}).decode.slots) == 2  # writes elsewhere
    assert resolve({**one, "phase": "prefill"}, {**one, "phase": "decode", "set": 2}).decode.slots


def test_two_features_of_one_dictionary_are_both_set() -> None:
    other = {"encoder": vector(11), "decoder": vector(12)}
    x = stream(4)
    f = max(x @ other["encoder"].directions[HERE].astype(np.float64), 0)
    expected = x + (5 - activation(x, RELU)) * d + (1 - f) * other["decoder"].directions[HERE].astype(np.float64)
    np.testing.assert_allclose(left(x, feature(**RELU, set=5), feature(**RELU, **other, set=1)), expected, atol=1e-5)


def test_it_travels_and_origins_name_both_rows() -> None:
    gate = {"probe": {"post_block": {"1": [1.0] * H}}, "threshold": 0.5}
    step = feature(**JUMP, encoder="w", decoder="d", min=1, gate=gate, layers=[2, 3])
    steering = resolve(step, feature(**GATED, set=-3), names={"w": W, "d": D})
    found = decode(encode(steering), {W.digest: W, D.digest: D})
    assert found == steering
    assert found.identity("decode") == steering.identity("decode")
    assert [origin.name for origin in steering.vectors][:2] == ["w", "d"]


def test_it_is_read_from_a_dictionary_and_written_out_by_its_parts() -> None:
    rows = {"cats": DictionaryRow(W, D, 0.5, gate_bias=-0.25, gain=1.5)}
    step = {"kind": "feature", "dictionary": Dictionary("gated", rows), "feature": "cats", "set": 3, "layers": [2]}
    assert resolve(step) == resolve(feature(**GATED, set=3))
    steering = Steering.parse({"interventions": [step]})
    assert Steering.parse(steering.model_dump(mode="json", exclude_none=True)) == steering
    assert Steering.parse(steering) == steering


MANY = vector(1, (HERE, Site(3, HookPoint.POST_BLOCK)))
BOOK = Dictionary("relu", {"cats": DictionaryRow(W, D)})
OF_BOOK = {"encoder": None, "decoder": None}  # left out
REFUSED = {
    "topk": ({"architecture": "topk", "set": 1}, "architecture", "depends on all rows"),
    "batchtopk": ({"architecture": "batch-topk", "set": 1}, "architecture", "give it as jumprelu, with the threshold"),
    "architecture": ({"architecture": "jumpreul", "set": 1}, "architecture", "did you mean 'jumprelu'"),
    "none": ({"set": 1}, "architecture", "required"),
    "no list": ({"architecture": ["relu"], "set": 1}, "architecture", "string"),
    "no threshold": ({"architecture": "jumprelu", "set": 1}, "threshold", "required"),
    "no gate": ({"architecture": "gated", "gain": 1, "set": 1}, "gate_bias", "required"),
    "no gain": ({"architecture": "gated", "gate_bias": 1, "set": 1}, "gain", "required"),
    "gain of relu": ({**RELU, "gain": 2, "set": 1}, "gain", "belongs to gated"),
    "gain below 0": ({**GATED, "gain": -2, "set": 1}, "gain", "above 0"),
    "gain huge": ({**GATED, "gain": 60000, "set": 1}, "gain", "65504"),
    "gated threshold": ({**GATED, "threshold": 1, "set": 1}, "threshold", "belongs to jumprelu"),
    "relu threshold": ({**RELU, "threshold": 1, "set": 1}, "threshold", "belongs to jumprelu"),
    "never": ({**GATED, "gain": 1e4, "gate_bias": -100, "set": 1}, "gate_bias", "never fire"),
    "nothing": (RELU, "", "changes nothing"),
    "set and scale": ({**RELU, "set": 1, "scale": 2}, "scale", "`set`"),
    "bounds": ({**RELU, "min": 2, "max": 1}, "min", "above `max`"),
    "huge": ({**RELU, "set": 1e6}, "set", "65504"),
    "infinite": ({**RELU, "set": math.inf}, "set", "finite"),
    "not a number": ({**RELU, "bias": math.nan, "set": 1}, "bias", "finite"),
    "text": ({**RELU, "set": "1"}, "set", "want a number"),
    "truth": ({**RELU, "set": 1, "only_if_active": 1}, "only_if_active", "true or false"),
    "zero": ({**RELU, "set": 1, "encoder": SteeringVector({HERE: [0.0] * H})}, "encoder", "zero at post_block:2"),
    "zero decoder": ({**RELU, "set": 1, "decoder": SteeringVector({HERE: [0.0] * H})}, "decoder", "zero at"),
    "tiny": ({**RELU, "set": 1, "decoder": SteeringVector({HERE: [1e-36] * H})}, "decoder", "less than"),
    "width": ({**RELU, "set": 1, "decoder": SteeringVector({HERE: [1.0]})}, "decoder", "width 1"),
    "two rows": ({**RELU, "set": 1, "encoder": MANY, "decoder": MANY}, "encoder", "one intervention for each row"),
    "elsewhere": ({**RELU, "set": 1, "decoder": vector(2, MANY.sites[1:])}, "decoder", "`encoder` at post_block:2"),
    "unknown": ({**RELU, "set": 1, "decoder": "nobody"}, "decoder", "no vector 'nobody'"),
    "vector": ({**RELU, "set": 1, "vector": W}, "vector", "unknown key"),
    "no dictionary": ({"feature": "cats", "set": 1}, "dictionary", "required"),
    "dictionary object": ({"dictionary": {"cats": 1}, "feature": "cats", "set": 1}, "dictionary", "trimtab.Dictionary"),
    "no feature": ({"dictionary": BOOK, "set": 1, **OF_BOOK}, "feature", "required: it names a row of cats"),
    "wrong feature": ({"dictionary": BOOK, "feature": "cat", "set": 1, **OF_BOOK}, "feature", "did you mean 'cats'"),
    "both": ({"dictionary": BOOK, "feature": "cats", "set": 1}, "decoder", "leave it out"),
    "bias too": ({"dictionary": BOOK, "feature": "cats", "set": 1, "bias": 1, **OF_BOOK}, "bias", "leave it out"),
}


@pytest.mark.parametrize(("said", "field", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_field(said: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(SteeringError) as caught:
        resolve({key: value for key, value in feature(**said).items() if value is not None})
    assert caught.value.field == f"interventions[0].{field}".removesuffix(".")
    assert message in caught.value.message


FAULTS = {
    "infinite": (("feature", 0, 1, [[None, [0.0, math.inf, 0.0, 1.0, 0.0, 0.0, 0.0]]], None), "got inf, want"),
    "bounds": (("feature", 0, 1, [[None, [0.0, 0.0, 0.0, 1.0, 2.0, 1.0, 0.0]]], None), "hold nothing"),
    "no write": (("feature", 0, None, [[None, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]], None), "writes another"),
    "no read": (("feature", None, 1, [[None, [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]]], None), "writes another"),
}


@pytest.mark.parametrize(("slot", "message"), FAULTS.values(), ids=FAULTS)
def test_what_another_process_sends_is_looked_at(slot: Any, message: str) -> None:
    wire = encode(resolve(feature(**RELU, set=1)))
    with pytest.raises(SteeringError, match=message):
        decode({**wire, "slots": [list(slot)]}, {})
