"""A program: the canonical sum of a phase, its row, and what tells rows and tokens apart."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Term
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors import SteeringVector

H = 5
SITES = [Site(layer, hook) for layer in range(4) for hook in HookPoint]
finite = st.floats(2.0**-40, 100, width=32) | st.floats(-100, -(2.0**-40), width=32) | st.just(0.0)
directions = st.dictionaries(st.sampled_from(SITES), st.lists(finite, min_size=H, max_size=H), min_size=1, max_size=4)
factors = st.floats(1e-20, 8) | st.floats(-8, -1e-20) | st.just(0.0)
terms = st.lists(st.tuples(directions, factors), min_size=1, max_size=4)


def vector(layer: int, *numbers: float) -> SteeringVector:
    return SteeringVector({Site(layer, HookPoint.POST_BLOCK): list(numbers) or [1.0] * H})


@given(terms, st.lists(st.sampled_from(SITES), min_size=1, max_size=6, unique=True))
@settings(max_examples=150, deadline=None)
def test_row_times_coefficient_is_the_sum_that_was_asked_for(items: list[Any], sites: list[Site]) -> None:
    program = PhaseProgram.of(Term(SteeringVector(d), scale) for d, scale in items)
    expected = np.zeros((len(sites), H))
    for content, scale in items:
        for position, site in enumerate(sites):
            expected[position] += scale * np.array(content.get(site, [0.0] * H), np.float64)
    if not program.terms:
        np.testing.assert_allclose(expected, 0.0, atol=1e-30)
        return
    row = program.row(sites)
    assert row.dtype == np.float32
    np.testing.assert_allclose(row.astype(np.float64) * program.coefficient, expected, rtol=3e-7, atol=1e-4)
    out = np.full_like(row, np.nan)
    assert program.row(sites, out=out) is out
    np.testing.assert_array_equal(out, row)


@given(terms, st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_terms_leaves_no_trace_in_any_bit(items: list[Any], random: Any) -> None:
    made = [Term(SteeringVector(d), scale) for d, scale in items] * 2
    first = PhaseProgram.of(made)
    random.shuffle(made)
    second = PhaseProgram.of(made)
    assert (first.row_key, first.coefficient, first.identity) == (second.row_key, second.coefficient, second.identity)
    if first.terms:
        assert first.row(SITES).tobytes() == second.row(SITES).tobytes()


def test_one_vector_at_many_scales_has_one_row() -> None:
    programs = [PhaseProgram.of([Term(vector(1), scale / 7)]) for scale in range(1, 1001)]
    assert {program.row_key for program in programs} == {vector(1).digest}
    assert len({program.identity for program in programs}) == 1000
    assert {program.factor for program in programs} == {scale / 7 for scale in range(1, 1001)}


def test_scales_that_float32_cannot_tell_apart_are_one_identity() -> None:
    a, b = (PhaseProgram.of([Term(vector(1), scale)]) for scale in (0.1, 0.1 + 1e-12))
    assert a.identity == b.identity


def test_equal_vectors_are_merged_and_what_adds_nothing_is_dropped() -> None:
    same, zero = vector(1, 1, 2, 3, 4, 5), vector(2, 0, 0, 0, 0, 0)
    program = PhaseProgram.of(
        [Term(same, 1.0), Term(zero, 3.0), Term(vector(1, 1, 2, 3, 4, 5), 0.5), Term(vector(3), 0)]
    )
    assert program == PhaseProgram.of([Term(same, 1.5)])
    assert PhaseProgram.of([Term(same, 2.0), Term(same, -2.0)]) is EMPTY
    assert PhaseProgram.of([]) is EMPTY
    assert (EMPTY.row_key, EMPTY.coefficient, EMPTY.identity, EMPTY.sites) == (b"", 0.0, "", ())


def test_a_sum_has_its_scales_in_the_row_and_the_factor_one() -> None:
    a, b = vector(1), vector(2)
    programs = [PhaseProgram.of([Term(a, x), Term(b, y)]) for x, y in [(1, 2), (2, 1), (2, 4)]]
    assert {program.factor for program in programs} == {1.0}
    assert len({program.row_key for program in programs} | {a.digest, b.digest}) == 5


def test_the_empty_program_has_no_row_and_widths_do_not_mix() -> None:
    with pytest.raises(ValueError, match="row 0"):
        EMPTY.row(SITES)
    with pytest.raises(ValueError, match="widths"):
        PhaseProgram.of([Term(vector(1), 1.0), Term(vector(1, 1.0), 1.0)])
    with pytest.raises(ValueError, match="out has shape"):
        PhaseProgram.of([Term(vector(1), 1.0)]).row(SITES, out=np.zeros((1, H), np.float32))


def test_sites_of_both_phases_are_listed_in_forward_order() -> None:
    late = SteeringVector({Site(1, HookPoint.POST_BLOCK): [1.0] * H, Site(1, HookPoint.PRE_ATTN): [1.0] * H})
    early = SteeringVector({Site(0, HookPoint.MLP_OUT): [1.0] * H})
    steering = ResolvedSteering((PhaseProgram.of([Term(late, 1.0)]), PhaseProgram.of([Term(early, 1.0)])))
    assert [str(site) for site in steering.sites] == ["mlp_out:0", "pre_attn:1", "post_block:1"]
    assert steering.program(Phase.PREFILL) is steering.prefill
    assert steering.identity(Phase.DECODE) == steering.decode.identity


def test_merged_scales_are_summed_exactly_in_any_order() -> None:
    scales = [0.1, 0.2, 0.3, 1e15, -1e15]
    for turn in range(len(scales)):
        turned = scales[turn:] + scales[:turn]
        program = PhaseProgram.of([*(Term(vector(1), scale) for scale in turned), Term(vector(2), 1.0)])
        assert [term.scale for term in program.terms if term.vector == vector(1)] == [math.fsum(scales)]


def test_what_is_small_in_each_term_adds_up_before_it_is_rounded() -> None:
    """In float32, 1 + 2**-25 is 1, whichever term comes first at one of these places."""
    small = 2.0**-25
    terms = [Term(vector(1, *(1.0 if place == k else small for place in range(H))), 1.0) for k in range(H)]
    program = PhaseProgram.of(terms)
    row = program.row([Site(1, HookPoint.POST_BLOCK)])[0] * np.float32(program.coefficient)
    np.testing.assert_array_equal(row, np.full(H, np.float32(1.0 + 4 * small)))
    assert np.float32(1.0 + 4 * small) > 1.0


def test_a_row_is_rounded_once() -> None:
    a, b = [0.1, 0.2, 1e-3, 7.3, -5.5], [0.3, -0.2, 1e3, 1e-5, 5.5]
    program = PhaseProgram.of([Term(vector(1, *a), 0.1), Term(vector(1, *b), 0.7)])
    exact = [
        Fraction(float(np.float32(x))) * Fraction(0.1) + Fraction(float(np.float32(y))) * Fraction(0.7)
        for x, y in zip(a, b, strict=True)
    ]
    expected = np.array([float(value) for value in exact], np.float64).astype(np.float32)
    row = program.row([Site(1, HookPoint.POST_BLOCK)])[0]
    np.testing.assert_array_equal(row * np.float32(program.coefficient), expected)  # a power of two: exact
