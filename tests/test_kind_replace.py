"""`replace` puts a vector in the stream's place: the formula in float64 against the path that engines take, and what
is refused of all that looks at the stream before steering."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinds_cases import HERE, MODEL, H, resolve, unit, vector
from kinds_looking_back import PROBE, TOLERANCE, steered
from trimtab.errors import SteeringError
from trimtab.program.codec import decode, encode
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.sites import HookPoint, Site, SlotLimits
from trimtab.spec import Steering

V, W, T = vector(1, scale=30.0), vector(2, scale=1e-3), vector(3)
v, w = (one.directions[HERE].astype(np.float64) for one in (V, W))

streams = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=(5, H)) * 20)
amounts = st.floats(0.0625, 1.0, width=32)


def test_all_of_the_stream_is_the_vector_exactly() -> None:
    x = np.random.default_rng(0).normal(size=(5, H)) * 1e3
    for form in ("traced", "opaque"):
        found = steered(resolve({"kind": "replace", "vector": V}), x, form)
        np.testing.assert_array_equal(found, np.broadcast_to(v.astype(np.float32), x.shape))
        nothing = steered(resolve({"kind": "replace", "vector": V * 0.0}), x, form)
        np.testing.assert_array_equal(nothing, 0.0 * x)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("form", ["traced", "opaque"])
@pytest.mark.parametrize("steps", [[1.0], [0.3, 0.7], [0.1, 0.2, 0.7]])
def test_all_of_the_stream_is_the_vector_whatever_the_stream_was(steps, form, split) -> None:
    """0 times infinity is no 0: what is infinite or NaN in a token is gone too, and what is not is as in others."""
    x = np.random.default_rng(0).normal(size=(5, H))
    x[0, 2], x[1, :], x[2, 3], x[2, 4] = np.inf, np.nan, -np.inf, np.nan
    rest = np.random.default_rng(1).normal(size=x.shape) if split else None
    spec = resolve(*({"kind": "replace", "vector": V, "amount": amount} for amount in steps))
    found = steered(spec, x, form, rest) + (0 if rest is None else rest)
    np.testing.assert_allclose(found, np.broadcast_to(v, x.shape), **TOLERANCE)
    left = steered(resolve({"kind": "replace", "vector": V, "amount": 0.5}), x, form, rest)
    assert not np.isfinite(left[~np.isfinite(x)]).any()


@given(streams, amounts, amounts, st.sampled_from(["traced", "opaque"]))
def test_shares_of_the_stream_are_replaced(x, one, other, form) -> None:
    one, other = one / 2, other / 2
    spec = resolve(
        {"kind": "replace", "vector": V, "amount": one},
        {"kind": "replace", "vector": W, "amount": other},
        {"kind": "add", "vector": T, "scale": 3.0},
    )
    expected = (1 - one - other) * x + one * v + other * w + 3.0 * T.directions[HERE].astype(np.float64)
    np.testing.assert_allclose(steered(spec, x, form), expected, **TOLERANCE)


@given(streams, amounts, st.sampled_from(["traced", "opaque"]))
def test_slots_measure_what_has_come_in(x, amount, form) -> None:
    a = unit(T.directions[HERE])
    spec = resolve({"kind": "replace", "vector": V, "amount": amount}, {"kind": "clamp", "vector": T, "value": 2.0})
    y = (1 - amount) * x + amount * v
    np.testing.assert_allclose(steered(spec, x, form), y + (2.0 - y @ a)[:, None] * a, **TOLERANCE)


@given(streams, amounts, st.floats(-3, 3), st.booleans(), st.sampled_from(["traced", "opaque"]))
def test_a_gate_lets_a_share_through(x, amount, threshold, hard, form) -> None:
    gate = {"probe": PROBE, "threshold": threshold, "hard": True} if hard else {"probe": PROBE, "threshold": threshold}
    score = x @ PROBE.directions[HERE].astype(np.float64)
    if np.abs(score - threshold).min() < 1e-3:
        return
    opened = (score > threshold).astype(float) if hard else 1 / (1 + np.exp(-(score - threshold)))
    m = (amount * opened)[:, None]
    spec = resolve({"kind": "replace", "vector": V, "amount": amount, "gate": gate})
    found = steered(spec, x, form)
    np.testing.assert_allclose(found, (1 - m) * x + m * v, **TOLERANCE)
    if hard:
        np.testing.assert_array_equal(found[opened == 0.0], x.astype(np.float32)[opened == 0.0])


@pytest.mark.parametrize(
    ("steps", "field", "said"),
    [
        ([{"amount": 0}], "interventions[0].amount", "more than 0 and at most 1"),
        ([{"amount": 1.5}], "interventions[0].amount", "more than 0 and at most 1"),
        ([{"amount": -1}], "interventions[0].amount", "more than 0"),
        ([{"amount": "1"}], "interventions[0].amount", "want a number"),
        ([{"scale": 1}], "interventions[0].scale", "unknown key"),
        ([{"vector": V * 1e4}], "interventions[0].vector", "more than the 65504"),
        ([{"amount": 0.7}, {"amount": 0.4}], "interventions", r"replace 1\.1 of the stream at post_block:2 together"),
    ],
)
def test_what_cannot_be_replaced_is_refused(steps, field, said) -> None:
    with pytest.raises(SteeringError, match=said) as caught:
        resolve(*({"kind": "replace", "vector": V} | step for step in steps))
    assert caught.value.field == field


def test_amounts_count_by_site_and_phase() -> None:
    other = vector(4, (Site(3, HookPoint.POST_BLOCK),))
    half = {"kind": "replace", "vector": V, "amount": 0.6}
    resolve(half, half | {"vector": other})
    resolve(half | {"phase": "prefill"}, half | {"phase": "decode"})
    with pytest.raises(SteeringError, match=r"replace 1\.2 "):
        resolve(half, half | {"phase": "decode"})


def test_an_engine_that_was_not_started_for_it_refuses_it() -> None:
    limited = replace(MODEL, slots=SlotLimits(2, MODEL.sites, frozenset({"clamp"})))
    for step, field in (({"kind": "replace"}, "kind"), ({"kind": "add", "unit": "norm"}, "unit")):
        with pytest.raises(SteeringError, match="--steering-kinds") as caught:
            resolve(step | {"vector": V}, model=limited)
        assert caught.value.field == f"interventions[0].{field}"
    with pytest.raises(SteeringError, match=r"`keep_norm`.*--steering-kinds") as caught:
        Steering.parse({"interventions": [{"kind": "add", "vector": V}], "keep_norm": True}).resolve({}, limited)
    assert caught.value.field == "keep_norm"


@given(st.permutations(range(4)))
def test_the_order_changes_nothing_and_all_of_it_travels(order) -> None:
    gate = {"probe": PROBE, "threshold": 0.5}
    steps = [
        {"kind": "replace", "vector": V, "amount": 0.5, "gate": gate},
        {"kind": "replace", "vector": W, "amount": 0.25, "phase": "decode"},
        {"kind": "add", "vector": "t", "unit": "norm", "scale": 0.1},
        {"kind": "ablate", "vector": V},
    ]
    names = {"t": T}
    one = Steering.parse({"interventions": steps, "keep_norm": "if_grown"}).resolve(names, MODEL)
    other = Steering.parse({"interventions": [steps[i] for i in order], "keep_norm": "if_grown"}).resolve(names, MODEL)
    assert one.programs == other.programs
    arrived = decode(encode(one), {T.digest: T})
    assert arrived.programs == one.programs
    assert [program.identity for program in arrived.programs] == [program.identity for program in other.programs]


def test_a_monitor_stands_before_it() -> None:
    both = vector(5, (Site(1, HookPoint.POST_BLOCK), HERE))
    spec = Steering.parse({"interventions": [{"kind": "replace", "vector": both, "amount": 0.5}], "keep_norm": True})
    found = behind(spec.resolve({}, MODEL), ResolvedGate.of(PROBE, 0.5, None, label="(monitor)"))
    told = {(slot.response, slot.sites, slot.gate is not None) for slot in found.decode.slots}
    first, here = both.sites
    assert told == {
        ("replace", (first,), False),
        ("replace", (here,), True),
        ("keep_norm", (first, here), False),
    }
    assert decode(encode(found), {}).programs == found.programs
