"""A probe: one site, one direction, one bias, one file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors import Probe, SteeringVector, VectorMetadata

SITE = Site(7, HookPoint.POST_BLOCK)
PROBE = Probe.at(SITE, [0.5, -1.0, 2.0], bias=-0.1, metadata=VectorMetadata("m", "logistic_regression"))


def test_a_probe_knows_its_site_direction_and_bias() -> None:
    assert (PROBE.site, PROBE.direction.tolist(), PROBE.bias) == (SITE, [0.5, -1.0, 2.0], float(np.float32(-0.1)))
    assert PROBE.metadata.method == "logistic_regression"


def test_a_probe_file_reads_back_to_the_same_probe_and_is_no_vector(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    PROBE.save(path)
    back = Probe.load(path)
    assert (back, back.digest, back.metadata) == (PROBE, PROBE.digest, PROBE.metadata)
    with pytest.raises(SteeringError, match=r"metadata\.format: is 'trimtab-probe'"):
        SteeringVector.load(path)
    PROBE.vector.save(path)
    with pytest.raises(SteeringError, match="is 'trimtab-steering-vector', want 'trimtab-probe'"):
        Probe.load(path)


def test_every_part_of_a_probe_is_in_its_digest() -> None:
    others = [
        Probe.at(SITE, [0.5, -1.0, 2.0], bias=0.1),
        Probe.at(SITE, [0.5, -1.0, 2.5], bias=-0.1),
        Probe.at(Site(6, HookPoint.POST_BLOCK), [0.5, -1.0, 2.0], bias=-0.1),
        Probe.at(Site(7, HookPoint.PRE_ATTN), [0.5, -1.0, 2.0], bias=-0.1),
    ]
    assert len({probe.digest for probe in [PROBE, *others]} | {PROBE.vector.digest}) == 6
    assert Probe.at(SITE, np.array([0.5, -1.0, 2.0]), bias=-0.1).digest == PROBE.digest


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), 1e39, True, "1", None])
def test_a_bias_that_is_no_finite_number_is_refused(bias: Any) -> None:
    with pytest.raises(SteeringError, match="bias: got"):
        Probe.at(SITE, [1.0], bias=bias)


def test_a_probe_at_several_sites_is_refused() -> None:
    with pytest.raises(SteeringError, match="read at one site, this vector has 2"):
        Probe(SteeringVector({SITE: [1.0], Site(8, HookPoint.POST_BLOCK): [1.0]}))


@pytest.mark.parametrize("bias", [None, "x", "nan", "1e39"])
def test_a_probe_file_without_a_usable_bias_is_refused(tmp_path: Path, bias: str | None) -> None:
    metadata = {"format": "trimtab-probe", "version": "1", "hidden_size": "1"} | (
        {} if bias is None else {"bias": bias}
    )
    save_file({"post_block.7": np.ones(1, np.float32)}, tmp_path / "p.safetensors", metadata)
    with pytest.raises(SteeringError, match="bias"):
        Probe.load(tmp_path / "p.safetensors")


def test_a_probe_has_one_file_format(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=r"written as \.safetensors"):
        PROBE.save(tmp_path / "p.gguf")
    with pytest.raises(SteeringError, match="no such file"):
        Probe.load(tmp_path / "p.safetensors")
    (tmp_path / "p.pt").write_bytes(b"")
    with pytest.raises(SteeringError, match=r"read from \.safetensors"):
        Probe.load(tmp_path / "p.pt")
