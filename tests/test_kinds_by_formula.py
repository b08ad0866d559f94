"""Every kind does what its formula says: formulas written out here, in float64, on random streams."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinds_cases import HERE, H, Row, done, resolve, unit, vector

V, T = vector(1, scale=30.0), vector(2, scale=1e-3)
A, B = unit(V.directions[HERE]), unit(T.directions[HERE])

streams = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=H) * 20)
numbers = st.floats(-40, 40, width=32)


def left(stream: Row, *steps: dict) -> Row:
    return done(resolve(*steps).decode, stream)


@given(streams, st.floats(0, 2, width=32))
def test_ablate_takes_a_projection_out(x: Row, strength: float) -> None:
    found = left(x, {"kind": "ablate", "vector": V, "strength": strength})
    np.testing.assert_allclose(found, x - strength * (x @ A) * A, atol=1e-9)


@given(streams, numbers)
def test_scale_multiplies_a_projection(x: Row, factor: float) -> None:
    found = left(x, {"kind": "scale", "vector": V, "factor": factor})
    np.testing.assert_allclose(found, x + (factor - 1) * (x @ A) * A, rtol=1e-5, atol=1e-4)  # 1 - factor is float32


@given(streams, numbers, numbers, st.floats(0, 1, width=32))
def test_clamp_moves_a_projection_between_its_bounds(x: Row, one: float, other: float, strength: float) -> None:
    low, high = sorted((one, other))
    found = left(x, {"kind": "clamp", "vector": V, "min": low, "max": high, "strength": strength})
    u = x @ A
    np.testing.assert_allclose(found, x + strength * (np.clip(u, low, high) - u) * A, atol=1e-9)
    capped = left(x, {"kind": "clamp", "vector": V, "max": high})
    np.testing.assert_allclose(capped, x - max(0.0, u - high) * A, atol=1e-9)
    floored = left(x, {"kind": "clamp", "vector": V, "min": low})
    np.testing.assert_allclose(floored, x + max(0.0, low - u) * A, atol=1e-9)


@given(streams)
def test_swap_writes_along_one_direction_what_was_along_another(x: Row) -> None:
    found = left(x, {"kind": "swap", "vector": V, "to": T})
    np.testing.assert_allclose(found, x + (x @ A) * (B - A), atol=1e-8)


@given(streams)
def test_slots_act_on_what_comes_of_adding(x: Row) -> None:
    found = left(x, {"kind": "ablate", "vector": V}, {"kind": "add", "vector": V, "scale": 3.0})
    np.testing.assert_allclose(found, x - (x @ A) * A, atol=1e-4)


SAME = {
    "nothing left": [
        {"kind": "ablate", "vector": V},
        {"kind": "scale", "vector": V, "factor": 0},
        {"kind": "clamp", "vector": V, "value": 0},
        {"kind": "clamp", "vector": V, "min": 0, "max": 0.0},
        {"kind": "ablate", "vector": V, "strength": 1, "layers": [2]},
        {"kind": "clamp", "vector": V, "value": {"2": 0}},
    ],
    "reflected": [
        {"kind": "ablate", "vector": V, "strength": 2},
        {"kind": "scale", "vector": V, "factor": -1},
    ],
    "a half": [
        {"kind": "ablate", "vector": V, "strength": 0.5},
        {"kind": "scale", "vector": V, "factor": 0.5},
        {"kind": "clamp", "vector": V, "value": 0, "strength": 0.5},
    ],
    "bounded": [
        {"kind": "clamp", "vector": V, "value": 2.5},
        {"kind": "clamp", "vector": V, "min": 2.5, "max": {2: 2.5}},
    ],
    "nothing": [
        {"kind": "ablate", "vector": V, "strength": 0},
        {"kind": "scale", "vector": V, "factor": 1},
        {"kind": "clamp", "vector": V, "max": -3, "strength": 0},
        {"kind": "add", "vector": V, "scale": 0},
    ],
}


@pytest.mark.parametrize("steps", SAME.values(), ids=SAME)
def test_kinds_that_can_say_the_same_come_down_to_the_same(steps: list[dict]) -> None:
    programs = {resolve(step).decode for step in steps}
    assert len(programs) == 1
    assert len({program.identity for program in programs}) == 1


def test_a_swap_and_an_ablation_beside_an_addition_differ() -> None:
    """`swap` for orthogonal directions leaves nothing of the first and adds to the second, token by token."""
    first, second = np.eye(H)[:2]
    x = np.arange(1.0, H + 1)
    found = left(
        x, {"kind": "swap", "vector": {"post_block": {"2": list(first)}}, "to": {"post_block": {"2": list(second * 9)}}}
    )
    np.testing.assert_allclose(found, [0.0, 1.0 + 2.0, *x[2:]], atol=1e-6)


@given(st.permutations(range(5)))
def test_the_order_of_interventions_changes_nothing_to_the_bit(order: list[int]) -> None:
    gate = {"probe": {"post_block": {"1": [1.0] * H}}, "threshold": 0.5}
    steps = [
        {"kind": "ablate", "vector": vector(3), "gate": gate},
        {"kind": "clamp", "vector": V, "min": -1},
        {"kind": "clamp", "vector": V * -2, "min": -1, "max": 7},
        {"kind": "swap", "vector": T, "to": V, "gate": {**gate, "threshold": 1.5}},
        {"kind": "add", "vector": T, "scale": 2, "gate": gate},
    ]
    one, other = resolve(*steps), resolve(*(steps[index] for index in order))
    assert one.decode == other.decode
    assert one.identity("decode") == other.identity("decode")
    site = (HERE,)
    assert one.decode.row(site).tobytes() == other.decode.row(site).tobytes()
    for mine, theirs in zip(one.decode.slots, other.decode.slots, strict=True):
        assert mine.read.row(site).tobytes() == theirs.read.row(site).tobytes()
