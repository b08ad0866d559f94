"""Vector files: the native format, the choice of reader, and what is not a vector file."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors import SteeringVector, VectorMetadata
from trimtab.vectors.formats.native import site_of_key

VECTOR = SteeringVector(
    {Site(14, HookPoint.POST_BLOCK): [0.1, -2.0, 3.5], Site(2, HookPoint.MLP_IN): [1.0, 0.0, 1e-30]},
    VectorMetadata("org/model", "mean_difference", "prompts.json", {"license": "CC0", "version": "mine"}),
)
META = {"format": "trimtab-steering-vector", "version": "1", "hidden_size": "2"}
ROW = np.array([1.0, 2.0], np.float32)


def test_a_native_file_holds_one_named_float32_tensor_per_site(tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "v.safetensors")
    tensors = load_file(tmp_path / "v.safetensors")  # the format as any other program sees it
    assert {name: (t.dtype.name, t.shape) for name, t in tensors.items()} == {
        "post_block.14": ("float32", (3,)),
        "mlp_in.2": ("float32", (3,)),
    }
    raw = (tmp_path / "v.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["__metadata__"] == {
        "format": "trimtab-steering-vector",
        "version": "1",
        "hidden_size": "3",
        "base_model": "org/model",
        "method": "mean_difference",
        "source": "prompts.json",
        "extra.license": "CC0",
        "extra.version": "mine",
    }


def test_a_native_file_reads_back_to_the_same_vector(tmp_path: Path) -> None:
    VECTOR.save(str(tmp_path / "v.safetensors"))
    back = SteeringVector.load(str(tmp_path / "v.safetensors"))
    assert back == VECTOR
    assert back.metadata == VECTOR.metadata


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"post_block.1": ROW}, None, "metadata.format: is None"),
        ({"post_block.1": ROW}, META | {"format": "pt"}, "metadata.format: is 'pt'"),
        ({"post_block.1": ROW}, META | {"version": "2"}, "this release reads '1'"),
        ({"post_block.1": ROW}, META | {"hidden_size": "3"}, "says '3', but the tensors have 2"),
        ({}, META, "at least one site"),
        ({"post_block.1": ROW, "extra": ROW}, META, "tensor 'extra': is not named HOOK.LAYER"),
        ({"post_blok.1": ROW}, META, "is not named HOOK.LAYER"),
        ({"post_block.01": ROW}, META, "without leading zeros"),
        ({"post_block.-1": ROW}, META, "is not named HOOK.LAYER"),
        ({"post_block.1": ROW[None]}, META, r"float32 \[1, 2\]"),
        ({"post_block.1": ROW, "post_block.2": ROW[:1]}, META, "has 1 numbers"),
        ({"post_block.1": ROW * np.nan}, META, "finite"),
        ({"post_block.1": ROW.astype(bool)}, META, "is stored as BOOL"),
    ],
)
def test_a_safetensors_file_that_is_no_vector_is_refused(
    tmp_path: Path, tensors: Any, metadata: Any, words: str
) -> None:
    path = tmp_path / "v.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(SteeringError, match=words) as refusal:
        SteeringVector.load(path)
    assert refusal.value.field == str(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_other_widths_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_torch({"post_block.3": torch.tensor([1.5, -2.0], dtype=dtype)}, tmp_path / "v.safetensors", META)
    vector = SteeringVector.load(tmp_path / "v.safetensors")
    assert vector.directions[Site(3, HookPoint.POST_BLOCK)].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(("dtype", "name"), [(np.int64, "I64"), (np.uint8, "U8")])
def test_tensors_that_hold_no_floats_are_refused(tmp_path: Path, dtype: Any, name: str) -> None:
    save_file({"post_block.3": ROW.astype(dtype)}, tmp_path / "v.safetensors", META)
    with pytest.raises(SteeringError, match=f"tensor 'post_block.3': is stored as {name}, want a float type"):
        SteeringVector.load(tmp_path / "v.safetensors")


def test_a_file_cut_anywhere_or_with_any_byte_changed_is_refused_or_still_a_vector(tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "broken.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SteeringError):
            SteeringVector.load(path)
    for position in range(0, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            vector = SteeringVector.load(path)
        except SteeringError:
            continue
        assert np.isfinite(vector.block).all()


def test_an_absurd_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(SteeringError, match="cannot be read as a steering vector"):
        SteeringVector.load(path)


@pytest.mark.parametrize("name", ["v.pt", "v.pkl", "v.npz", "v.bin", "v"])
def test_a_file_of_unknown_suffix_is_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cposix\nsystem\n")
    with pytest.raises(SteeringError, match="the suffix is unknown"):
        SteeringVector.load(tmp_path / name)
    with pytest.raises(SteeringError, match=r"written as \.safetensors"):
        VECTOR.save(tmp_path / name)


def test_a_missing_file_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match="there is no such file"):
        SteeringVector.load(tmp_path / "none.safetensors")
    for suffix in ("safetensors", "gguf"):
        with pytest.raises(SteeringError, match="cannot be written"):
            VECTOR.at([14]).save(tmp_path / "none" / f"v.{suffix}")


def test_an_enormous_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with path.open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(SteeringError, match="too large"):
        SteeringVector.load(path)


@pytest.mark.parametrize("hook", list(HookPoint))
def test_tensor_names_stand_for_sites(hook: HookPoint) -> None:
    assert site_of_key(f"{hook.value}.31") == Site(31, hook)
