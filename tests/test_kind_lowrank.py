"""`lowrank`: its formula in float64, what LoReFT and its relatives come down to, refusals, and the wire."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinds_cases import HERE, LAYERS, SITES, H, Row, done, resolve, vector
from kinds_device import served
from trimtab.errors import SteeringError
from trimtab.program.codec import decode, encode
from trimtab.sites import HookPoint, ModelSites, Site, SlotLimits, site_order
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

Matrix = npt.NDArray[np.float64]
seeds = st.integers(0, 2**32 - 1)


def rows(matrix: Matrix, site: Site = HERE) -> list[SteeringVector]:
    return [SteeringVector({site: row}) for row in matrix]


def lowrank(read: Matrix, write: Matrix, bias: Any = None, **more: Any) -> dict[str, Any]:
    step = {"kind": "lowrank", "read": rows(read), "write": rows(write), **more}
    return step if bias is None else step | {"bias": list(map(float, bias))}


def left(x: Row, *steps: dict[str, Any]) -> Row:
    return done(resolve(*steps).decode, x)


@given(seeds, st.integers(1, 6), st.booleans())
def test_it_is_the_formula(seed: int, rank: int, biased: bool) -> None:
    random = np.random.default_rng(seed)
    read, write, x = random.normal(size=(rank, H)), random.normal(size=(rank, H)) * 7, random.normal(size=H)
    bias = random.normal(size=rank) if biased else np.zeros(rank)
    found = left(x, lowrank(read, write, bias if biased else None))
    np.testing.assert_allclose(found, x + (read @ x + bias) @ write, atol=1e-4)


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_the_device_does_it_beside_other_slots(seed: int, rank: int, tokens: int) -> None:
    random = np.random.default_rng(seed)
    read, write = random.normal(size=(rank, H)), random.normal(size=(rank, H)) * 0.1
    x = random.normal(size=(tokens, H)).astype(np.float32)
    steps = [lowrank(read, write, np.ones(rank)), {"kind": "ablate", "vector": vector(9)}]
    expected = [left(row.astype(np.float64), *steps) for row in x]
    np.testing.assert_allclose(served(x, *steps), expected, atol=1e-4)


RANK = 3
RANDOM = np.random.default_rng(8)
R = np.linalg.qr(RANDOM.normal(size=(H, RANK)))[0].T  # orthonormal rows, as ReFT's rotation has
W, B = RANDOM.normal(size=(RANK, H)), RANDOM.normal(size=RANK)
P, Q = RANDOM.normal(size=(2, H, RANK))
EPSILON = 0.125
STREAMS = RANDOM.normal(size=(5, H)).astype(np.float32)

THEIRS = {  # each on a column h, as its paper writes it; and what docs/kinds.md says it is
    "LoReFT": (lambda h: h + R.T @ (W @ h + B - R @ h), lowrank(W - R, R, B)),
    "DiReFT": (lambda h: h + R.T @ (W @ h + B), lowrank(W, R, B)),
    "NoReFT": (lambda h: h + P @ (W @ h + B - P.T @ h), lowrank(W - P.T, P.T, B)),
    "ConsReFT": (lambda h: h + R.T @ (B - R @ h), lowrank(-R, R, B)),
    "LobiReFT": (lambda h: h + R.T @ B, {"kind": "add", "vector": SteeringVector({HERE: R.T @ B})}),
    "LM-Steer": (lambda h: h + EPSILON * (h @ P) @ Q.T, lowrank(P.T, EPSILON * Q.T)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_others_train_comes_down_to_it(name: str) -> None:
    formula, step = THEIRS[name]
    expected = [formula(row.astype(np.float64)) for row in STREAMS]
    np.testing.assert_allclose([left(row.astype(np.float64), step) for row in STREAMS], expected, atol=1e-5)
    if name != "LobiReFT":
        np.testing.assert_allclose(served(STREAMS, step), expected, atol=1e-4)


def test_a_loreft_puts_the_subspace_where_it_wants_it() -> None:
    """Behind it, R z is W h + b: what the method is for."""
    for row in STREAMS.astype(np.float64):
        np.testing.assert_allclose(R @ left(row, THEIRS["LoReFT"][1]), W @ row + B, atol=1e-5)


@given(st.permutations(range(RANK)))
def test_the_order_of_ranks_and_of_interventions_changes_nothing_to_the_bit(order: list[int]) -> None:
    other = {"kind": "clamp", "vector": vector(3), "min": 1}
    one = resolve(lowrank(W, R, B), other)
    found = resolve(other, lowrank(W[order], R[order], B[order]))
    assert one.decode == found.decode
    assert one.identity("decode") == found.identity("decode")


def test_what_differs_has_another_name() -> None:
    specs = [lowrank(W, R, B), lowrank(W, R), lowrank(2 * W, R, B), lowrank(W, 2 * R, B), lowrank(R, W, B),
             lowrank(W, R, B[::-1]), lowrank(W, R, B, layers=[3]), lowrank(W[:2], R[:2], B[:2])]  # fmt: skip
    assert len({resolve(spec).identity("decode") for spec in specs}) == len(specs)
    assert resolve(lowrank(W, R)) == resolve(lowrank(W, R, [0.0] * RANK))


def test_it_travels_by_name_and_inline() -> None:
    names = {"a": rows(W)[0], "r": rows(R)[0]}
    gate = {"probe": {"post_block": {"1": [1.0] * H}}, "threshold": 0.5}
    step = {
        "kind": "lowrank",
        "read": ["a", rows(W)[1]],
        "write": ["r", rows(R * 1e-9)[1]],
        "bias": [0.5, 1],
        "gate": gate,
    }
    steering = resolve(step, {**step, "layers": [3, 4], "hooks": ["pre_attn"]}, names=names)
    found = decode(encode(steering), {vector.digest: vector for vector in names.values()})
    assert found == steering
    assert found.identity("decode") == steering.identity("decode")
    assert [origin.name for origin in steering.vectors] == ["a", None, "r", None]


ZERO, WIDE = SteeringVector({HERE: [0.0] * H}), SteeringVector({HERE: [1.0, 2.0]})
THERE = SteeringVector({Site(3, HookPoint.POST_BLOCK): [1.0] * H})
V = vector(1)
REFUSED = {
    "no read": ({"write": [V]}, "interventions[0].read", "required"),
    "no list": ({"read": V, "write": [V]}, "interventions[0].read", "want a list of vectors"),
    "empty": ({"read": [], "write": []}, "interventions[0].read", "want 1 to 64"),
    "65": ({"read": [V] * 65, "write": [V] * 65}, "interventions[0].read", "want 1 to 64"),
    "no vector": ({"read": [V, 3], "write": [V, V]}, "interventions[0].read[1]", "got int"),
    "fault within": (
        {"read": [V, {"post_block": {"2": "x"}}], "write": [V, V]}, "interventions[0].read[1].post_block.2", "want",
    ),
    "ranks differ": ({"read": [V, V], "write": [V]}, "interventions[0].write", "has 1 items, but `read` has 2"),
    "biases": ({"read": [V], "write": [V], "bias": [1, 2]}, "interventions[0].bias", "has 2 items"),
    "one bias": ({"read": [V], "write": [V], "bias": 1}, "interventions[0].bias", "want a list of numbers"),
    "bias text": ({"read": [V], "write": [V], "bias": ["1"]}, "interventions[0].bias[0]", "want a number"),
    "bias huge": ({"read": [V], "write": [V], "bias": [1e6]}, "interventions[0].bias[0]", "65504"),
    "huge": ({"read": [V * 1e9], "write": [V]}, "interventions[0].read[0]", "65504"),
    "tiny": ({"read": [V], "write": [V * 1e-36]}, "interventions[0].write[0]", "less than"),
    "zero read": ({"read": [V, ZERO], "write": [V, V]}, "interventions[0].read[1]", "zero at post_block:2"),
    "zero write": ({"read": [V], "write": [ZERO]}, "interventions[0].write[0]", "zero at post_block:2"),
    "elsewhere": ({"read": [V], "write": [THERE]}, "interventions[0].write[0]", "`read[0]` at post_block:2"),
    "width": ({"read": [V], "write": [WIDE]}, "interventions[0].write[0]", "width 2"),
    "unknown name": ({"read": [V], "write": ["nobody"]}, "interventions[0].write[0]", "no vector 'nobody'"),
    "a vector": ({"read": [V], "write": [V], "vector": V}, "interventions[0].vector", "unknown key"),
    "no such layer": ({"read": [V], "write": [V], "layers": [9]}, "interventions[0].layers", "does not exist"),
    "no such layer in read": (
        {"read": [vector(1, (Site(9, HookPoint.POST_BLOCK),))], "write": [vector(2, (Site(9, HookPoint.POST_BLOCK),))]},
        "interventions[0].read[0].post_block", "does not exist",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "field", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_field(said: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(SteeringError) as caught:
        resolve({"kind": "lowrank", **said})
    assert caught.value.field == field
    assert message in caught.value.message


def test_ranks_are_slots() -> None:
    model = ModelSites(H, LAYERS, SITES, slots=SlotLimits(2, SITES, frozenset({"lowrank"})))
    assert len(resolve(lowrank(W[:2], R[:2]), model=model).decode.slots) == 2
    with pytest.raises(SteeringError, match="--steering-slots 3"):
        resolve(lowrank(W, R), model=model)


def test_inline_vectors_count_towards_the_limit_of_a_request() -> None:
    wide = SteeringVector({HERE: np.ones(1 << 20, np.float32)})
    with pytest.raises(SteeringError, match="inline vectors take"):
        Steering.parse({"interventions": [{"kind": "lowrank", "read": [wide] * 3, "write": [wide] * 3}]})


def test_it_is_written_out_as_it_was_read() -> None:
    steering = Steering.parse({"interventions": [lowrank(W, R, B)]})
    assert Steering.parse(steering.model_dump(mode="json", exclude_none=True)) == steering


def test_more_slots_than_can_travel_are_refused_where_they_are_asked_for() -> None:
    """Sixteen of rank nine, each at a site of its own: no site has too many, and all together do."""
    sites = sorted(SITES, key=site_order)[:16]
    model = ModelSites(H, LAYERS, SITES, slots=SlotLimits(16, SITES, frozenset({"lowrank"})))
    steps = [{"kind": "lowrank", "read": rows(R, site) * 3, "write": rows(R, site) * 3} for site in sites]
    served = Steering.parse({"interventions": steps[:14]}).resolve({}, model)
    assert len(served.decode.slots) == 126
    with pytest.raises(SteeringError, match="has 144 slots on one token, at most 128"):
        Steering.parse({"interventions": steps}).resolve({}, model)
