"""Files are written whole, with the rights that new files have, and name models rather than machines."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors import Probe, SteeringVector
from trimtab.vectors.content import model_name

VECTOR = SteeringVector({Site(1, HookPoint.POST_BLOCK): [1.0, 2.0]})
PROBE = Probe.at(Site(1, HookPoint.POST_BLOCK), [1.0, 2.0])


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["v.safetensors", "v.gguf", "p.safetensors"])
def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int, name: str) -> None:
    if name.endswith("gguf"):
        pytest.importorskip("gguf")
    content = PROBE if name.startswith("p") else VECTOR
    content.save(tmp_path / name)
    assert mode(tmp_path / name) == 0o666 & ~umask
    (tmp_path / name).chmod(0o640)
    content.save(tmp_path / name)
    assert mode(tmp_path / name) == 0o640  # what was there keeps its rights
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    pytest.importorskip("gguf")
    VECTOR.save(path)
    before = path.read_bytes()
    with pytest.raises(SteeringError, match="GGUF holds post_block directions alone"):
        SteeringVector({Site(1, HookPoint.PRE_ATTN): [1.0, 2.0]}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["v.gguf"]


def test_a_link_still_points_to_the_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "v.safetensors"
    link.symlink_to(tmp_path / "real" / "v.safetensors")
    VECTOR.save(link)
    assert link.is_symlink()
    assert SteeringVector.load(tmp_path / "real" / "v.safetensors") == VECTOR


def test_metadata_name_the_model_and_not_the_folder_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    for given, name in {
        str(tmp_path / "my-model"): "my-model",
        "/nowhere/of/mine/llama": "llama",
        "./llama": "llama",
        "meta-llama/Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
        "": "",
    }.items():
        assert model_name(SimpleNamespace(_name_or_path=given)) == name
    assert model_name(SimpleNamespace()) == ""
