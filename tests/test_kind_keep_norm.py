"""`keep_norm` of a spec: each token leaves a site where it acts as long as it came."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kinds_cases import HERE, MODEL, H, resolve, vector
from kinds_looking_back import PROBE, TOLERANCE, steered
from trimtab.errors import SteeringError
from trimtab.ops.looking_back import TokenSlots, norm_kept
from trimtab.responses import KEEP_NORM
from trimtab.serving.server_default import merge
from trimtab.sites import HookPoint, Site
from trimtab.spec import Steering

V = vector(1, scale=10.0)
streams = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=(6, H)) * 20)
forms = st.sampled_from(["traced", "opaque"])
GATED = {"probe": PROBE, "threshold": 0.0, "hard": True}


def spec(*steps: dict, keep_norm: object = True):
    return Steering.parse({"interventions": list(steps), "keep_norm": keep_norm}).resolve({}, MODEL)


STEPS = [
    {"kind": "add", "vector": V, "scale": 2.0},
    {"kind": "clamp", "vector": vector(2), "value": 40.0},
    {"kind": "add", "vector": vector(3), "unit": "norm", "scale": 0.5},
    {"kind": "replace", "vector": vector(4, scale=5.0), "amount": 0.5},
]


@given(streams, st.sets(st.integers(0, 3), min_size=1), st.booleans(), forms)
def test_a_token_leaves_as_long_as_it_came(x, chosen, split, form) -> None:
    steps = [STEPS[index] for index in sorted(chosen)]
    rest = x[::-1].copy() * 0.25 if split else None
    stream = x if rest is None else x + rest
    free = steered(resolve(*steps), x, form, rest) + (0 if rest is None else rest)
    kept = steered(spec(*steps), x, form, rest) + (0 if rest is None else rest)
    before, after = (np.linalg.norm(one, axis=1, keepdims=True) for one in (stream, free))
    np.testing.assert_allclose(kept, free * before / after, **TOLERANCE)
    shrunk = steered(spec(*steps, keep_norm="if_grown"), x, form, rest) + (0 if rest is None else rest)
    np.testing.assert_allclose(shrunk, free * np.minimum(1.0, before / after), **TOLERANCE)


@given(streams, forms, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_a_token_that_is_not_steered_keeps_its_numbers(x, form, dtype) -> None:
    found = spec({"kind": "add", "vector": V, "gate": GATED}, {"kind": "ablate", "vector": V, "gate": GATED})
    here = torch.from_numpy(x).to(dtype).double().numpy()
    shut = here @ PROBE.directions[HERE].astype(np.float64) < -1e-2
    np.testing.assert_array_equal(steered(found, x, form, dtype=dtype)[shut], here[shut])


@pytest.mark.parametrize("form", ["traced", "opaque"])
def test_a_norm_that_is_not_finite_is_not_kept(form) -> None:
    x = np.random.default_rng(0).normal(size=(3, H))
    x[0, 0], x[1, 0] = np.inf, np.nan
    found = steered(spec({"kind": "replace", "vector": V}), x, form)
    np.testing.assert_allclose(found[:2], np.broadcast_to(V.directions[HERE], (2, H)), **TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(found[2]), np.linalg.norm(x[2]), **TOLERANCE)


def test_an_untouched_token_keeps_its_numbers_where_its_norms_differ_by_a_rounding() -> None:
    """As sums of two reductions may; here the stream that comes is told to be longer than it is."""
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    slots = TokenSlots(
        torch.zeros(4, 1, 2, dtype=torch.int64), torch.tensor([[[KEEP_NORM.code, 0]]] * 4, dtype=torch.int32),
        torch.zeros(4, 1, 10), torch.zeros(4, 1, 1), torch.zeros(0, 4),
    )  # fmt: skip
    lengths = iter([hidden.square().sum(-1) * (1 + 1e-6), hidden.square().sum(-1)])
    with mock.patch.object(torch.Tensor, "sum", side_effect=lengths):
        kept = norm_kept(hidden.clone(), hidden, None, slots)
    assert torch.equal(kept, hidden)


def test_a_stream_of_nothing_stays_so() -> None:
    """What comes as nothing leaves as nothing, and what becomes nothing has no direction to be long in."""
    for form in ("traced", "opaque"):
        np.testing.assert_array_equal(steered(spec(STEPS[0]), np.zeros((2, H)), form), 0.0)
        gone = spec({"kind": "replace", "vector": V * 0.0})
        np.testing.assert_array_equal(steered(gone, np.ones((2, H)), form), 0.0)


def test_it_is_part_of_what_is_done() -> None:
    identities = {spec(STEPS[0], keep_norm=kept).identity("decode") for kept in (False, True, "if_grown")}
    assert len(identities) == 3
    assert not spec({"kind": "add", "vector": V, "scale": 0}).decode.identity
    assert not spec(STEPS[0] | {"phase": "decode"}).prefill.identity


def test_it_acts_where_something_else_does() -> None:
    other = vector(5, (Site(1, HookPoint.MLP_OUT), Site(3, HookPoint.POST_BLOCK)))
    found = spec(STEPS[0], {"kind": "ablate", "vector": other, "phase": "prefill"})
    kept = {phase: next(slot for slot in found.program(phase).slots if slot.kind == "keep_norm") for phase in
            ("prefill", "decode")}  # fmt: skip
    assert kept["prefill"].sites == (other.sites[0], HERE, other.sites[1])
    assert kept["decode"].sites == (HERE,)


@pytest.mark.parametrize("kept", ["yes", 1, None, "grown", []])
def test_what_it_is_not_is_refused(kept: object) -> None:
    with pytest.raises(SteeringError, match='want true, false or "if_grown"') as caught:
        spec(STEPS[0], keep_norm=kept)
    assert caught.value.field == "keep_norm"


def test_a_server_and_a_request_can_both_ask_for_it() -> None:
    def of(kept: object) -> Steering:
        return Steering.parse({"interventions": [STEPS[0]], "keep_norm": kept})

    assert merge(of(False), of(False)).keep_norm is False
    assert merge(of("if_grown"), of(False)).keep_norm == merge(of(False), of("if_grown")).keep_norm == "if_grown"
    assert merge(of("if_grown"), of(True)).keep_norm is merge(of(True), of(False)).keep_norm is True
