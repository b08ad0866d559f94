"""Norms of the stream that an engine is given: doses of vectors that say none are as long as these ask for."""

from pathlib import Path

import numpy as np
import pytest

from kinds_cases import HERE, LAYERS, MODEL, H, vector
from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.errors import SteeringError
from trimtab.serving.registry import VectorRegistry
from trimtab.sites import HookPoint, Site
from trimtab.spec import Steering
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.stream_norms import StreamNorms, doubt_of_model
from trimtab.vectors.vector import SteeringVector

NEXT = Site(HERE.layer + 1, HERE.hook)


def measured(v: SteeringVector, **norms: str) -> SteeringVector:
    """`v` saying norms, a key being HOOK.LAYER."""
    extra = {f"stream_norm.{key}": value for key, value in norms.items()}
    return v.with_metadata(VectorMetadata(base_model="org/tiny", extra=extra))


def dose(**more: object) -> Steering:
    return Steering.parse({"interventions": [{"kind": "add", "vector": "v", "unit": "dose", "scale": 0.5} | more]})


@pytest.mark.parametrize("own", [None, "3.0"])
def test_a_dose_takes_the_vectors_own_norm_before_the_given_one(own: str | None) -> None:
    v = vector(0, (HERE, NEXT))
    v = v if own is None else measured(v, **{"post_block.2": own})
    given = {HERE: 7.0, NEXT: 11.0}
    added = dose().resolve({"v": v}, MODEL, norms=given).decode
    rows = added.row((HERE, NEXT)).astype(np.float64) * added.coefficient
    expected = [0.5 * (7.0 if own is None else 3.0), 0.5 * 11.0]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), expected, rtol=1e-6)
    assert dose().identity("decode", {"v": v}, norms=given) == added.identity


def test_a_dose_by_other_norms_has_another_identity() -> None:
    one, same, other = (
        dose().resolve({"v": vector()}, MODEL, norms={HERE: n}).decode.identity for n in (2.0, 2.0, 2.5)
    )
    assert one == same != other


@pytest.mark.parametrize("own", ["nan", "0", "long"])
def test_what_a_vector_says_wrongly_is_not_replaced(own: str) -> None:
    with pytest.raises(SteeringError, match="median norm at post_block:2"):
        dose().resolve({"v": measured(vector(), **{"post_block.2": own})}, MODEL, norms={HERE: 7.0})


def test_a_site_without_any_norm_is_refused_with_the_setting() -> None:
    with pytest.raises(SteeringError, match=r"median norm at post_block:3.*--steering-norms") as caught:
        dose(layers=[2, 3]).resolve({"v": vector()}, MODEL, norms={HERE: 7.0})
    assert caught.value.field == "interventions[0].unit"


def test_a_vector_file_is_a_file_of_norms(tmp_path: Path) -> None:
    measured(vector(), **{"post_block.2": "7.5", "mlp_out.4": "1e-3"}).save(tmp_path / "v.safetensors")
    norms = StreamNorms.load(tmp_path / "v.safetensors")
    assert norms == StreamNorms({HERE: 7.5, Site(4, HookPoint.MLP_OUT): 1e-3}, H, "org/tiny")
    norms.check(MODEL, "norms")


def test_the_digest_is_of_sites_and_numbers() -> None:
    other = Site(4, HookPoint.MLP_OUT)
    alike = [StreamNorms({HERE: 1.0, other: 2.0}, H), StreamNorms({other: 2.0, HERE: 1.0}, H, "named")]
    others = [StreamNorms({HERE: 2.0, other: 1.0}, H), StreamNorms({HERE: 1.0}, H), StreamNorms({NEXT: 1.0}, H)]
    assert len({norms.digest for norms in alike}) == 1
    assert len({norms.digest for norms in (*alike, *others)}) == 4


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ({}, "has no norms.*trimtab extract"),
        ({"post_block.2": "0"}, "stream_norm.post_block.2.*above 0"),
        ({"post_block.2": "-1"}, "above 0"),
        ({"post_block.2": "nan"}, "finite"),
        ({"post_block.2": "inf"}, "finite"),
        ({"post_block.2": "much"}, "'much'"),
        ({"nowhere.2": "1"}, "stream_norm.nowhere.2.*HOOK being one of"),
        ({"post_block.x": "1"}, "stream_norm.post_block.x"),
    ],
)
def test_what_are_no_norms_is_refused(norms: dict[str, str], said: str) -> None:
    with pytest.raises(SteeringError, match=said):
        StreamNorms.said_by(measured(vector(), **norms))


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        (StreamNorms({HERE: 1.0}, H + 1), f"width {H + 1}, this model has hidden size {H}"),
        (StreamNorms({HERE: 1.0, Site(LAYERS, HERE.hook): 1.0}, H), f"post_block:{LAYERS}; the model has layers 0 to"),
    ],
)
def test_norms_of_another_model_are_refused(norms: StreamNorms, said: str) -> None:
    with pytest.raises(SteeringError, match=said) as caught:
        norms.check(MODEL, "steering.norms")
    assert caught.value.field == "steering.norms"


@pytest.mark.parametrize(
    ("base_model", "served", "doubted"),
    [
        ("org/tiny", "org/Tiny", False),
        ("org/tiny", "tiny", False),
        ("", "tiny", False),
        ("org/tiny", "", False),
        ("org/tiny", "0123456789abcdef0123456789abcdef01234567", False),
        ("org/tiny", "org/other", True),
    ],
)
def test_a_name_of_another_model_is_doubted_where_both_are_known(base_model: str, served: str, doubted: bool) -> None:
    assert (doubt_of_model(base_model, served) is not None) is doubted


def test_a_server_counts_doses_in_its_norms_and_so_does_its_default() -> None:
    spec = {"interventions": [{"kind": "add", "vector": "v", "unit": "dose"}]}
    norms = StreamNorms({HERE: 4.0}, H)
    front = FrontEnd(MODEL, VectorRegistry({"v": vector()}), spec, norms=norms)
    admitted = front.admit(None)
    assert admitted is not None
    program = admitted.steering.decode
    assert np.linalg.norm(program.row((HERE,)).astype(np.float64) * program.coefficient) == pytest.approx(4.0, rel=1e-6)
    with pytest.raises(SteeringError, match="--steering-norms"):
        FrontEnd(MODEL, VectorRegistry({"v": vector()}), spec)
