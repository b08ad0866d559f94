"""GGUF control vectors: `direction.N` is what block N, counted from 0, puts out."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors import SteeringVector, VectorMetadata
from trimtab.vectors.formats.gguf import write_gguf
from work import calls

gguf = pytest.importorskip("gguf")

ROWS = np.array([[0.5, -2.0, 3.5], [1.0, 0.0, 1e-3]], np.float32)
VECTOR = SteeringVector(
    {Site(1, HookPoint.POST_BLOCK): ROWS[0], Site(14, HookPoint.POST_BLOCK): ROWS[1]},
    VectorMetadata("llama", "pca", "prompts.json"),
)


def write(path: Path, tensors: dict[str, Any], arch: str = "controlvector", **fields: str) -> Path:
    """A file as another program writes it, by the gguf package alone."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        writer.add_string(f"{arch}.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_written_file_is_a_control_vector_as_llama_cpp_expects_it(tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    layer_count = reader.get_field("controlvector.layer_count")
    assert (layer_count.contents(), layer_count.types[0].name) == (2, "INT32")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.14"}
    assert all(tensor.tensor_type.name == "F32" for tensor in tensors.values())
    np.testing.assert_array_equal(tensors["direction.14"].data, ROWS[1])


def test_a_written_file_reads_back_to_the_same_vector(tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "v.gguf")
    back = SteeringVector.load(tmp_path / "v.gguf")
    assert back == VECTOR
    assert (back.metadata.base_model, back.metadata.method) == ("llama", "pca")
    assert back.metadata.source == "prompts.json"


@pytest.mark.parametrize("arch", ["controlvector", "steeringvector"])
def test_direction_n_is_the_output_of_block_n(tmp_path: Path, arch: str) -> None:
    path = write(tmp_path / "v.gguf", {"direction.0": ROWS[0], "direction.7": ROWS[1]}, arch, model_hint="qwen2")
    vector = SteeringVector.load(path)
    assert {site: row.tolist() for site, row in vector.directions.items()} == {
        Site(0, HookPoint.POST_BLOCK): ROWS[0].tolist(),
        Site(7, HookPoint.POST_BLOCK): ROWS[1].tolist(),
    }
    assert vector.metadata.base_model == "qwen2"


def test_missing_metadata_is_no_fault(tmp_path: Path) -> None:
    vector = SteeringVector.load(write(tmp_path / "v.gguf", {"direction.3": ROWS[0]}))
    assert vector.metadata.base_model == ""


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "bfloat16"])
def test_other_plain_float_types_are_read(tmp_path: Path, dtype: Any) -> None:
    exact = np.array([0.5, -2.0, 3.5, 1.0], np.float32)
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    if dtype == "bfloat16":
        bits = (exact.view(np.uint32) >> 16).astype(np.uint16)
        writer.add_tensor("direction.2", bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor("direction.2", exact.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    vector = SteeringVector.load(tmp_path / "v.gguf")
    np.testing.assert_array_equal(vector.directions[Site(2, HookPoint.POST_BLOCK)], exact)


@pytest.mark.parametrize(
    ("tensors", "arch", "words"),
    [
        ({"direction.1": ROWS[0]}, "llama", "general.architecture: is 'llama'"),
        ({"direction.1": ROWS[0], "blk.0.attn": ROWS[0]}, "controlvector", "is not named direction.N"),
        ({"direction.-1": ROWS[0]}, "controlvector", "is not named direction.N"),
        ({"direction.01": ROWS[0]}, "controlvector", "is not named direction.N"),
        ({"direction.1": ROWS}, "controlvector", "want \\[hidden_size\\]"),
        ({"direction.1": ROWS[0], "direction.2": ROWS[0][:2]}, "controlvector", "has 2 numbers"),
        ({"direction.1": ROWS[0] * np.nan}, "controlvector", "finite"),
        ({"direction.1": np.array([1, 2], np.int32)}, "controlvector", "stored as I32"),
        ({}, "controlvector", "at least one site"),
    ],
)
def test_a_gguf_file_that_is_no_control_vector_is_refused(tmp_path: Path, tensors: Any, arch: str, words: str) -> None:
    path = write(tmp_path / "v.gguf", tensors, arch)
    with pytest.raises(SteeringError, match=words) as refusal:
        SteeringVector.load(path)
    assert refusal.value.field == str(path)


def test_what_llama_cpp_cannot_express_is_written_only_on_request(tmp_path: Path) -> None:
    zero = SteeringVector({Site(0, HookPoint.POST_BLOCK): ROWS[0], Site(1, HookPoint.POST_BLOCK): ROWS[1]})
    with pytest.raises(SteeringError, match=r"llama\.cpp cannot steer block 0"):
        zero.save(tmp_path / "v.gguf")
    write_gguf(zero, tmp_path / "v.gguf", allow_block_zero=True)
    assert SteeringVector.load(tmp_path / "v.gguf") == zero
    with pytest.raises(SteeringError, match="post_block directions alone, not mlp_in:1"):
        SteeringVector({Site(1, HookPoint.MLP_IN): ROWS[0]}).save(tmp_path / "w.gguf")
    assert not (tmp_path / "w.gguf").exists()


def test_a_file_cut_or_changed_anywhere_is_refused_or_still_a_vector(tmp_path: Path) -> None:
    VECTOR.save(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "broken.gguf"
    for length in range(0, len(whole) - 4 * 3 - 32, 3):  # the last bytes are the alignment's padding
        path.write_bytes(whole[:length])
        with pytest.raises(SteeringError):
            SteeringVector.load(path)
    for position in range(0, len(whole), 2):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            vector = SteeringVector.load(path)
        except SteeringError:
            continue
        assert np.isfinite(vector.block).all()


@pytest.mark.parametrize(
    ("item", "length", "items", "words"),
    [(0, 1 << 60, b"", "ends before"), (0, 10**6, bytes(10**6), "more fields"), (9, 1 << 60, b"", "ends before")],
)
def test_a_header_that_announces_an_endless_array_is_refused_at_once(
    tmp_path: Path, item: int, length: int, items: bytes, words: str
) -> None:
    array = struct.pack("<Q1sIIQ", 1, b"k", 9, item, length) + items  # key, type ARRAY, item type, length
    (tmp_path / "v.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + array)

    def load() -> None:
        with pytest.raises(SteeringError, match=words):
            SteeringVector.load(tmp_path / "v.gguf")

    load()  # what the first call imports is not counted
    assert calls(load) < 3_000_000  # half of that for 50,000 reads; a million items read to their end take 30 million
