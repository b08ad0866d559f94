"""`add` in its units: what is added is as long as it was asked to be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinds_cases import HERE, SITES, H, resolve, unit, vector
from kinds_looking_back import PROBE, TOLERANCE, steered
from trimtab.errors import SteeringError
from trimtab.program.codec import decode, encode
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.vector import SteeringVector

scales = st.floats(1e-20, 2) | st.floats(-2, -1e-20) | st.just(0.0)
SITES_OF_V = (Site(1, HookPoint.POST_BLOCK), Site(2, HookPoint.MLP_OUT), HERE, Site(4, HookPoint.POST_BLOCK))


def measured(norms: dict[Site, float | str], seed: int = 0) -> SteeringVector:
    """A vector whose metadata say how long the stream is at its sites, in the words of files."""
    extra = {f"stream_norm.{site.hook.value}.{site.layer}": str(norm) for site, norm in norms.items()}
    return vector(seed, tuple(norms), scale=7.0).with_metadata(VectorMetadata(extra=extra))


@given(st.lists(st.floats(0.01, 100), min_size=4, max_size=4), scales, st.booleans())
def test_a_dose_is_as_long_as_so_many_streams(norms: list[float], scale: float, named: bool) -> None:
    given_norms = dict(zip(SITES_OF_V, norms, strict=True))
    v = measured(given_norms)
    step = {"kind": "add", "vector": "v" if named else v, "unit": "dose", "scale": scale}
    found = resolve(step, names={"v": v})
    program = found.decode
    assert not program.slots
    if not scale:
        assert not program.row_key
        return
    added = program.row(SITES_OF_V).astype(np.float64) * program.coefficient
    for site, row in zip(SITES_OF_V, added, strict=True):
        direction = v.directions[site].astype(np.float64)
        expected = scale * given_norms[site] * direction / np.linalg.norm(direction)
        np.testing.assert_allclose(row, expected, rtol=2e-6, atol=1e-6 * np.abs(added).max())
    arrived = decode(encode(found), {v.digest: v})
    assert arrived.programs == found.programs
    assert [(origin.name, origin.digest) for origin in found.vectors] == [("v" if named else None, v.digest)]


def test_a_dose_at_one_site_is_a_scale() -> None:
    v = measured({HERE: 12.0})
    dose = resolve({"kind": "add", "vector": v, "unit": "dose", "scale": 0.5}).decode
    raw = resolve({"kind": "add", "vector": v, "scale": 0.5 * 12.0 / v.norms()[HERE]}).decode
    assert dose == raw
    assert dose.identity == raw.identity
    assert (
        resolve({"kind": "add", "vector": v, "unit": "raw", "scale": 3}).decode
        == resolve({"kind": "add", "vector": v, "scale": 3}).decode
    )


def test_a_dose_is_part_of_the_identity() -> None:
    one, other = (
        resolve({"kind": "add", "vector": measured(dict.fromkeys(SITES_OF_V, norm)), "unit": "dose"}).decode
        for norm in (3.0, 3.5)
    )
    assert one.identity != other.identity


@pytest.mark.parametrize("norm", ["", "nan", "inf", "0", "-3", "long"])
def test_a_dose_of_an_unknown_stream_is_refused_with_the_remedy(norm: str) -> None:
    v = measured({Site(1, HookPoint.POST_BLOCK): 2.0, HERE: norm})
    with pytest.raises(SteeringError, match=r"median norm at post_block:2.*trimtab extract.*raw") as caught:
        resolve({"kind": "add", "vector": v}, {"kind": "add", "vector": v, "unit": "dose"})
    assert caught.value.field == "interventions[1].unit"
    resolve({"kind": "add", "vector": v, "unit": "dose", "layers": [1]})  # where it is known, it is served


def test_a_direction_with_one_norm_is_no_dose_elsewhere() -> None:
    v = measured({HERE: 2.0})
    with pytest.raises(SteeringError, match="median norm at post_block:3"):
        resolve({"kind": "add", "vector": v, "unit": "dose", "layers": [2, 3]})
    everywhere = {site: 2.0 for site in SITES if site.hook is HookPoint.POST_BLOCK}
    names = {"v": v.with_metadata(measured(everywhere).metadata)}
    found = resolve({"kind": "add", "vector": "v", "unit": "dose", "layers": [2, 3]}, names=names)
    assert found.sites == (HERE, Site(3, HookPoint.POST_BLOCK))
    assert decode(encode(found), {v.digest: v}).programs == found.programs


@pytest.mark.parametrize(
    ("step", "field", "said"),
    [
        ({"unit": "norms"}, "unit", "dose"),
        ({"unit": "dose", "scale": 1e30}, "scale", "more than the 65504"),
        ({"unit": "dose", "vector": SteeringVector({HERE: np.zeros(H)})}, "vector", "zero at post_block:2"),
    ],
)
def test_what_is_no_dose_is_refused(step: dict, field: str, said: str) -> None:
    with pytest.raises(SteeringError, match=said) as caught:
        resolve({"kind": "add", "vector": measured({HERE: 2.0})} | step)
    assert caught.value.field == f"interventions[0].{field}"


streams = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(size=(5, H)) * 20)


@given(streams, st.floats(-3, 3, width=32), st.booleans(), st.sampled_from(["traced", "opaque"]))
def test_a_norm_is_as_long_as_the_token(x, scale, split, form) -> None:
    """As `x + scale * v / |v| * |x|` of others, which read the full stream: of two parts, their sum."""
    v = vector(1, scale=30.0)
    a, w = unit(v.directions[HERE]), vector(2).directions[HERE].astype(np.float64)
    spec = resolve({"kind": "add", "vector": v, "unit": "norm", "scale": scale}, {"kind": "add", "vector": vector(2)})
    rest = x[::-1].copy() * 0.5 if split else None
    length = np.linalg.norm(x if rest is None else x + rest, axis=1, keepdims=True)
    np.testing.assert_allclose(steered(spec, x, form, rest), x + w + scale * length * a, **TOLERANCE)


@given(streams, st.sampled_from(["traced", "opaque"]))
def test_slots_measure_what_a_norm_adds(x, form) -> None:
    v = vector(1)
    spec = resolve({"kind": "add", "vector": v, "unit": "norm"}, {"kind": "ablate", "vector": v})
    a = unit(v.directions[HERE])
    np.testing.assert_allclose(steered(spec, x, form), x - (x @ a)[:, None] * a, **TOLERANCE)


@given(streams, st.sampled_from(["traced", "opaque"]))
def test_a_norm_behind_a_shut_gate_adds_nothing_to_the_bit(x, form) -> None:
    gate = {"probe": PROBE, "threshold": 0.0, "hard": True}
    spec = resolve({"kind": "add", "vector": vector(1), "unit": "norm", "scale": 0.5, "gate": gate})
    score = x.astype(np.float32).astype(np.float64) @ PROBE.directions[HERE].astype(np.float64)
    shut, open_ = score < -1e-3, score > 1e-3
    found, a = steered(spec, x, form), unit(vector(1).directions[HERE])
    np.testing.assert_array_equal(found[shut], x.astype(np.float32)[shut])
    due = x + 0.5 * np.linalg.norm(x, axis=1, keepdims=True) * a
    np.testing.assert_allclose(found[open_], due[open_], **TOLERANCE)


def test_a_norm_of_nothing_is_nothing_and_a_zero_direction_is_refused() -> None:
    assert not resolve({"kind": "add", "vector": vector(1), "unit": "norm", "scale": 0}).decode.identity
    with pytest.raises(SteeringError, match="zero at post_block:2") as caught:
        resolve({"kind": "add", "vector": SteeringVector({HERE: np.zeros(H)}), "unit": "norm"})
    assert caught.value.field == "interventions[0].vector"
    with pytest.raises(SteeringError, match="at most 65504") as caught:
        resolve({"kind": "add", "vector": vector(1), "unit": "norm", "scale": 1e6})
    assert caught.value.field == "interventions[0].scale"
