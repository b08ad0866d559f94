"""A steering vector: what it takes, what it refuses, its arithmetic and its digest."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors import SteeringVector, VectorMetadata

POST = HookPoint.POST_BLOCK
A = SteeringVector({Site(1, POST): [3.0, 4.0], Site(2, HookPoint.MLP_IN): [0.0, 2.0]}, VectorMetadata("m", "caa", "s"))
B = SteeringVector({Site(1, POST): [1.0, -1.0], Site(5, POST): [5.0, 5.0]}, VectorMetadata("m"))


def content(vector: SteeringVector) -> dict[str, list[float]]:
    return {str(site): row.tolist() for site, row in vector.directions.items()}


def test_sites_are_kept_in_forward_order_with_their_own_direction() -> None:
    rows = {Site(layer, hook): [layer, len(hook)] for layer in (3, 0) for hook in reversed(HookPoint)}
    vector = SteeringVector(rows)
    expected = ["pre_attn", "attn_out", "post_attn", "mlp_in", "mlp_out", "post_block"]
    assert [str(site) for site in vector.sites] == [f"{hook}:{layer}" for layer in (0, 3) for hook in expected]
    assert all(vector.directions[site].tolist() == numbers for site, numbers in rows.items())
    assert (vector.hidden_size, vector.layers) == (2, (0, 3))


@pytest.mark.parametrize(
    "row",
    [
        [1, -2.5],
        (1.0, -2.5),
        np.array([1, -2.5], np.float16),
        np.array([1, -2.5], ">f8"),
        torch.tensor([1, -2.5]),
        torch.tensor([1, -2.5], dtype=torch.bfloat16, requires_grad=True),
        np.array([[1, 0], [-2.5, 0]])[:, 0],
    ],
)
def test_lists_arrays_and_tensors_hold_the_same_numbers(row: Any) -> None:
    vector = SteeringVector({Site(0, POST): row})
    assert vector.block.dtype == np.float32
    assert content(vector) == {"post_block:0": [1.0, -2.5]}
    assert vector.digest == SteeringVector({(0, "post_block"): [1.0, -2.5]}).digest


def test_numbers_are_rounded_to_float32_once() -> None:
    assert SteeringVector({Site(0, POST): [0.1]}).block[0, 0] == np.float32(0.1)


def test_nothing_in_a_vector_can_be_changed_from_outside() -> None:
    row = np.ones((1, 2), np.float32)
    vector = SteeringVector({Site(0, POST): row[0]})
    row[:] = 7
    assert content(vector) == {"post_block:0": [1.0, 1.0]}
    with pytest.raises(ValueError, match="read-only"):
        vector.block[0, 0] = 2
    with pytest.raises(ValueError, match="read-only"):
        vector.directions[Site(0, POST)][0] = 2
    with pytest.raises(TypeError):
        vector.directions[Site(0, POST)] = row[0]  # type: ignore[index]
    with pytest.raises(AttributeError):
        vector.sites = ()  # type: ignore[misc]
    assert copy.deepcopy(vector) is vector


@pytest.mark.parametrize(
    ("directions", "words"),
    [
        ({}, "at least one site"),
        ({Site(0, POST): [1.0], Site(1, POST): [1.0, 2.0]}, r"directions\[post_block:1\]: has 2 numbers"),
        ({Site(0, POST): []}, "shape \\[hidden_size\\]"),
        ({Site(0, POST): [[1.0]]}, "got \\[1.0\\], want a finite number"),
        ({Site(0, POST): np.ones((1, 1))}, "float64 \\[1, 1\\]"),
        ({Site(0, POST): np.ones(2, bool)}, "an array of bool"),
        ({Site(0, POST): torch.ones(2, dtype=torch.bool)}, "an array of bool"),
        ({Site(0, POST): np.ones(2, complex)}, "complex"),
        ({Site(0, POST): "12"}, "got an array of <U2"),
        ({Site(0, POST): [1.0, True]}, r"directions\[post_block:0\]\[1\]: got True"),
        ({Site(0, POST): [1.0, float("nan")]}, r"\[1\]: got nan, want a number that is finite"),
        ({Site(0, POST): np.array([1e300])}, "finite in float32"),
        ({(0, "post_blok"): [1.0]}, "is not a site"),
        ({(-1, "post_block"): [1.0]}, "counted from 0"),
        ({(True, "post_block"): [1.0]}, "counted from 0"),
        ({"post_block.1": [1.0]}, "is not a site"),
        ({7: [1.0]}, "is not a site"),
    ],
)
def test_what_is_not_a_vector_is_refused(directions: Any, words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        SteeringVector(directions)


def test_scaling_negating_adding_and_subtracting_act_site_by_site() -> None:
    assert content(2 * A) == content(A * 2) == {"post_block:1": [6.0, 8.0], "mlp_in:2": [0.0, 4.0]}
    assert content(-A) == {"post_block:1": [-3.0, -4.0], "mlp_in:2": [0.0, -2.0]}
    assert content(A + B) == {"post_block:1": [4.0, 3.0], "mlp_in:2": [0.0, 2.0], "post_block:5": [5.0, 5.0]}
    assert content(A - B) == {"post_block:1": [2.0, 5.0], "mlp_in:2": [0.0, 2.0], "post_block:5": [-5.0, -5.0]}
    assert (A + B).metadata.base_model == "m"
    assert (np.float32(0.5) * A).digest == (A * 0.5).digest


def test_arithmetic_with_anything_else_is_a_type_error() -> None:
    for operation in (lambda: A * True, lambda: A * "2", lambda: A + 1, lambda: A - 1, lambda: A * B):
        with pytest.raises(TypeError):
            operation()


def test_arithmetic_that_leaves_float32_or_the_width_is_refused() -> None:
    with pytest.raises(SteeringError, match="not finite in float32"):
        A * 1e39
    with pytest.raises(SteeringError, match="width 2 and 3"):
        A + SteeringVector({Site(0, POST): [1.0, 1.0, 1.0]})


def test_normalizing_makes_each_direction_unit_length() -> None:
    assert content(A.normalized()) == {
        "post_block:1": pytest.approx([0.6, 0.8], rel=1e-7),
        "mlp_in:2": [0.0, 1.0],
    }
    assert A.norms() == {Site(1, POST): 5.0, Site(2, HookPoint.MLP_IN): 2.0}
    with pytest.raises(SteeringError, match="post_block:0 is zero"):
        SteeringVector({Site(0, POST): [0.0, 0.0]}).normalized()


def test_narrowing_keeps_the_layers_that_are_named() -> None:
    assert content((A + B).at([5, 1])) == {"post_block:1": [4.0, 3.0], "post_block:5": [5.0, 5.0]}
    assert (A + B).at([1]).digest == SteeringVector({Site(1, POST): [4.0, 3.0]}).digest
    assert A.at([1]) is A.at((1,))
    assert A.at(range(1, 3)) is A
    with pytest.raises(SteeringError, match="layer 3 is not among its layers 1, 2"):
        A.at([1, 3])
    with pytest.raises(SteeringError, match="no layer is given"):
        A.at([])


def test_a_vector_narrowed_in_many_ways_does_not_keep_them_all() -> None:
    wide = SteeringVector({Site(layer, POST): [1.0] for layer in range(200)})
    first = wide.at([0])
    for layer in range(1, 200):
        assert wide.at([layer]).sites == (Site(layer, POST),)
    assert wide.at([0]) is not first
    assert wide.at([0]) == first


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)), st.integers(0, 2), st.integers(0, 3))
def test_equal_content_is_equal_and_one_changed_bit_is_not(block: Any, row: int, column: int) -> None:
    sites = [Site(layer, POST) for layer in (0, 4, 2)]
    vector = SteeringVector.from_block(sites, block.copy())
    same = SteeringVector(dict(zip(sites, block, strict=True)), VectorMetadata("other"))
    assert vector == same
    assert hash(vector) == hash(same)
    assert vector.max_abs == np.abs(block).max()
    changed = block.copy()
    changed[row, column] = np.nextafter(changed[row, column], np.float32(np.inf))
    assert SteeringVector.from_block(sites, changed) != vector


def test_a_digest_tells_one_wide_direction_from_two_narrow_ones() -> None:
    assert SteeringVector({Site(0, POST): [1.0, 1.0]}) != SteeringVector({Site(0, POST): [1.0], Site(1, POST): [1.0]})


@pytest.mark.parametrize(
    ("sites", "block", "words"),
    [
        ([Site(0, POST)], np.ones(3, np.float32), "want \\[n, H\\]"),
        ([Site(0, POST)], np.ones((2, 3), np.float32), "for 1 sites"),
        ([], np.ones((0, 3), np.float32), "for 0 sites"),
        ([Site(0, POST)] * 2, np.ones((2, 3), np.float32), "twice"),
        ([Site(0, POST), Site(3, POST)], np.array([[1.0], [np.inf]]), "number 0 at post_block:3 is not finite"),
    ],
)
def test_a_block_that_does_not_fit_its_sites_is_refused(sites: Any, block: Any, words: str) -> None:
    with pytest.raises(SteeringError, match=words) as refusal:
        SteeringVector.from_block(sites, block, field="here")
    assert refusal.value.field == "here"


def test_what_a_vector_remembers_of_its_layers_is_no_more_than_twice_its_own_size() -> None:
    whole = SteeringVector({Site(layer, HookPoint.POST_BLOCK): np.ones(8) for layer in range(40)})
    for last in range(1, 40):
        whole.at(range(last))
    assert sum(len(kept.sites) for kept in whole._narrowed.values()) <= 2 * len(whole.sites)
    assert whole.at(range(39)) is whole.at(range(39))


def test_threads_that_narrow_one_vector_at_a_time_get_what_they_asked_for() -> None:
    whole = SteeringVector({Site(layer, HookPoint.POST_BLOCK): np.full(2, layer + 1.0) for layer in range(40)})
    asked = [tuple(sorted({first, (first * 7 + step) % 40})) for step in range(40) for first in range(40)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            told = list(threads.map(whole.at, asked))
    finally:
        sys.setswitchinterval(interval)
    assert [vector.layers for vector in told] == asked
    assert len(whole._narrowed) <= 64
