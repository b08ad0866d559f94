"""Sets of slots at one site: where projections land, one direction given twice, and directions that are too close.

The oracle is float64 NumPy that knows nothing of the code's way: projections that are asked for are conditions of a
linear system, and what is done is the least change of the stream that meets them (`numpy.linalg.lstsq`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, PhaseProgram, Slot
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.slot_sets import formed, mixing
from trimtab.program.slots import Part
from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector

H = 16
HERE, THERE = Site(3, HookPoint.POST_BLOCK), Site(4, HookPoint.POST_BLOCK)
INFINITY = float("inf")
Rows = npt.NDArray[np.float64]


def slot(
    rows: SteeringVector | Sequence[float],
    low: float = 0.0,
    high: float = 0.0,
    strength: float = 1.0,
    gate: ResolvedGate | None = None,
    kind: str = "clamp",
    path: str = "",
) -> Slot:
    along = rows if isinstance(rows, SteeringVector) else SteeringVector({HERE: list(rows)})
    numbers = tuple((site, Numbers.of(0.0, strength, low, high)) for site in along.sites)
    return Slot("clip", Direction((Part(along),)), None, numbers, gate, kind, path)


def gate(threshold: float = 0.5) -> ResolvedGate:
    return ResolvedGate.of(SteeringVector({HERE: np.ones(H)}), threshold, 1.0)


def done(slots: Sequence[Slot], stream: Rows, site: Site = HERE, dtype: str = "float32") -> Rows:
    """What the formula of `trimtab.program.slots` makes of a stream [H] at `site`, rows stored in `dtype`."""
    active = [one for one in slots if site in one.at]
    rows = np.array([one.read.row((site,))[0].astype(dtype).astype(np.float64) * one.read.unit for one in active])
    scores = rows @ stream
    numbers = [one.at[site].own for one in active]
    written = np.array([s * (np.clip(u, low, high) - u) for u, (s, low, high) in zip(scores, numbers, strict=True)])
    return stream + (mixing(rows, np.ones(len(active), bool)) @ written) @ rows


def unit(row: Sequence[float]) -> Rows:
    values = np.asarray(row, np.float32).astype(np.float64)
    return values / np.sqrt(values @ values)


numbers = st.floats(-4, 4, width=32)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def directions(draw: st.DrawFn, most: int = 4) -> Rows:
    """1 to `most` directions [K, H], which overlap, but not too much."""
    count = draw(st.integers(1, most))
    random = np.random.default_rng(draw(seeds))
    rows = random.normal(size=(count, H)) + draw(st.floats(0, 1)) * random.normal(size=H)
    units = np.array([unit(row) for row in rows])
    assume(np.sqrt(np.diag(np.linalg.inv(units @ units.T))).max() < 9.9)
    return rows * draw(st.sampled_from([1e-20, 0.1, 1.0, 300.0]))


@given(directions(), seeds)
def test_after_an_ablation_of_independent_directions_every_projection_is_0(rows: Rows, seed: int) -> None:
    stream = np.random.default_rng(seed).normal(size=H) * 10
    left = done(formed([slot(row, kind="ablate") for row in rows]), stream)
    np.testing.assert_allclose([unit(row) @ left for row in rows], 0.0, atol=1e-4)
    units = np.array([unit(row) for row in rows])
    orthogonal = stream - units.T @ np.linalg.lstsq(units.T, stream, rcond=None)[0]
    np.testing.assert_allclose(left, orthogonal, atol=1e-4)


@given(directions(), seeds, st.data())
def test_clamped_projections_land_inside_their_intervals_and_nothing_else_moves(
    rows: Rows, seed: int, data: st.DataObject
) -> None:
    stream = np.random.default_rng(seed).normal(size=H) * 3
    bounds = [sorted((data.draw(numbers), data.draw(numbers))) for _ in rows]
    bounds = [(data.draw(st.sampled_from([low, -INFINITY])), high) for low, high in bounds]
    left = done(formed([slot(row, *bound) for row, bound in zip(rows, bounds, strict=True)]), stream)
    units = np.array([unit(row) for row in rows])
    wanted = np.clip(units @ stream, *np.array(bounds).T)
    np.testing.assert_allclose(units @ left, wanted, atol=1e-4)
    least = stream + np.linalg.lstsq(units, wanted - units @ stream, rcond=None)[0]
    np.testing.assert_allclose(left, least, atol=1e-3)


@given(directions(), seeds)
def test_rounded_rows_are_put_right_by_the_mixing(rows: Rows, seed: int) -> None:
    """Each projection along the row that is stored lands where it was asked to, to float64."""
    stream = np.random.default_rng(seed).normal(size=H) * 10
    slots = formed([slot(row, kind="ablate") for row in rows])
    left = done(slots, stream, dtype="float16")
    stored = np.array([one.read.row((HERE,))[0].astype("float16").astype(np.float64) * one.read.unit for one in slots])
    np.testing.assert_allclose(stored @ left, 0.0, atol=1e-9)


@given(directions(), st.permutations(range(4)))
def test_the_order_of_slots_changes_nothing_to_the_bit(rows: Rows, order: list[int]) -> None:
    slots = [slot(row, -index, 2.0, 0.5) for index, row in enumerate(rows)]
    slots += [slot(rows[0] * 3.0, -1.0, 1.0, 0.5), slot(-rows[0], -1.5, 1.0, 0.5)]
    mixed = [slots[index] for index in order if index < len(slots)] + slots[4:]
    mixed += [one for one in slots[:4] if one not in mixed]
    assert formed(mixed) == formed(slots)
    assert PhaseProgram.of([], mixed).identity == PhaseProgram.of([], slots).identity


def test_members_are_mixed_among_themselves_alone() -> None:
    rows = np.random.default_rng(3).normal(size=(4, H))
    members = np.array([True, False, True, False])
    mix = mixing(rows, members)
    np.testing.assert_array_equal(mix[~members], np.eye(4)[~members])
    np.testing.assert_array_equal(mix[:, ~members], np.eye(4)[:, ~members])
    pair = rows[members]
    np.testing.assert_allclose(mix[np.ix_(members, members)] @ (pair @ pair.T), np.eye(2), atol=1e-12)
    np.testing.assert_array_equal(mixing(np.zeros((3, H)), np.zeros(3, bool)), np.eye(3))


def test_what_has_strength_0_is_dropped_before_sets_are_formed() -> None:
    row = np.arange(1.0, H + 1)
    assert formed([slot(row, strength=0.0)]) == ()
    assert formed([slot(row, strength=0.0), slot(row * 2, 5, 6)]) == formed([slot(row * 2, 5, 6)])
    assert formed([slot(row, strength=1e-60), slot(row)]) == formed([slot(row)])
    both = SteeringVector({HERE: row, THERE: row})
    numbers = ((HERE, Numbers.of(0.0, 0.0, 0.0, 0.0)), (THERE, Numbers.of(0.0, 1.0, 0.0, 0.0)))
    (left,) = formed([Slot("clip", Direction((Part(both),)), None, numbers)])
    assert left.sites == (THERE,)


ROW = np.linspace(-1, 2, H)


@pytest.mark.parametrize("factor", [1.0, 0.3, -1.0, -7.0, 1e-12])
@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        ((-1.0, 2.0), (-0.5, INFINITY), (-0.5, 2.0)),
        ((-INFINITY, 2.0), (-3.0, INFINITY), (-3.0, 2.0)),
        ((-1.0, 1.0), (1.0, 3.0), (1.0, 1.0)),
    ],
)
def test_one_direction_given_twice_is_one_slot(factor: float, one: Rows, other: Rows, both: Rows) -> None:
    flipped = factor < 0
    turned = (-other[1], -other[0]) if flipped else other
    (found,) = formed([slot(ROW, *one), slot(ROW * factor, *turned)])
    low, high = both
    row = found.read.parts[0].vector.block[0].astype(np.float64)
    wanted = (low, high) if row @ ROW > 0 else (-high, -low)
    assert found.at[HERE].own == (1.0, *wanted)


CONTRADICTIONS = {
    "intervals that do not meet": (slot(ROW, 0, 1), slot(ROW * 2, 2, 3)),
    "an interval that does not meet the other's mirror image": (slot(ROW, 1, 2), slot(-ROW, 1, 2)),
    "strengths": (slot(ROW, 0, 0, 1.0), slot(ROW, 0, 0, 0.5)),
    "gates": (slot(ROW, gate=gate()), slot(ROW)),
    "different gates": (slot(ROW, gate=gate()), slot(ROW, gate=gate(0.75))),
}


@pytest.mark.parametrize("pair", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_itself_on_one_direction_is_refused(pair: tuple[Slot, Slot]) -> None:
    for slots in (pair, pair[::-1]):
        with pytest.raises(SteeringError, match=r"act along one direction .* at post_block:3 and ask for different"):
            formed(slots)


def test_a_refusal_says_who_contradicts_whom() -> None:
    one = slot(ROW, kind="ablate", path="interventions[0]")
    other = slot(ROW, 1.0, 2.0, kind="clamp", path="interventions[2]")
    with pytest.raises(SteeringError, match=r"ablate at interventions\[0\] and clamp at interventions\[2\]|clamp at"):
        formed([one, other])


def test_one_direction_given_twice_counts_where_both_act() -> None:
    both = SteeringVector({HERE: ROW, THERE: ROW[::-1]})
    slots = formed([slot(both, -1.0, 1.0), slot(ROW * 2, 0.0, 5.0)])
    held = {site: numbers for one in slots for site, numbers in one.numbers}
    assert sum(len(one.numbers) for one in slots) == 2
    assert (held[HERE].own, held[THERE].own) == ((1.0, 0.0, 1.0), (1.0, -1.0, 1.0))


@pytest.mark.parametrize(("cosine", "refused"), [(0.99, False), (0.9949, False), (0.996, True), (0.999999, True)])
def test_directions_are_refused_where_one_alone_would_move_a_token_ten_times_too_far(
    cosine: float, refused: bool
) -> None:
    one, other = np.eye(H)[:2]
    slots = [slot(one, kind="ablate"), slot(cosine * one + np.sqrt(1 - cosine**2) * other)]
    if not refused:
        assert len(formed(slots)) == 2
        return
    with pytest.raises(SteeringError, match=r"cannot act together at post_block:3") as caught:
        formed(slots)
    assert all(one.read.names in caught.value.message for one in slots)


def test_three_directions_in_a_plane_are_refused_though_no_two_are_close() -> None:
    one, other = np.eye(H)[:2]
    with pytest.raises(SteeringError, match=r"cannot act together at post_block:3.*dependent"):
        formed([slot(one), slot(other), slot(one + other)])


def test_more_directions_than_the_stream_is_wide_are_refused() -> None:
    rows = np.random.default_rng(1).normal(size=(4, 3))
    with pytest.raises(SteeringError, match="cannot act together"):
        formed([slot(row) for row in rows])


def test_slots_that_write_along_another_direction_are_no_members() -> None:
    along, to = SteeringVector({HERE: ROW}), SteeringVector({HERE: ROW[::-1]})
    numbers = ((HERE, Numbers.of(0.0, -1.0, 0.0, 0.0)),)
    swap = Slot("clip", Direction((Part(along),)), Direction((Part(to), Part(along, -1.0))), numbers)
    assert len(formed([swap, slot(ROW), swap])) == 3


def test_at_another_site_there_is_another_set() -> None:
    along = SteeringVector({THERE: ROW})
    assert len(formed([slot(ROW, 0, 1), slot(along, 2, 3)])) == 2


def test_formed_slots_stay_as_they_are() -> None:
    slots = formed([slot(ROW, -1, 1), slot(-ROW * 2, -5, 0.5), slot(ROW[::-1], 2, 3, 0.5, gate())])
    assert formed(slots) == slots
