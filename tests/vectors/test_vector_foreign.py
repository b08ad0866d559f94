"""Files of other tools: read where they hold directions of the residual stream, refused where they do not."""

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors import SteeringVector


def svec(path: Path, **content: Any) -> Path:
    (path / "v.svec").write_text(json.dumps(content))
    return path / "v.svec"


def rows(vector: SteeringVector) -> dict[str, list[float]]:
    return {str(site): row.tolist() for site, row in vector.directions.items()}


def test_svec_layers_are_where_ibms_library_adds_them_the_inputs_of_blocks(tmp_path: Path) -> None:
    path = svec(tmp_path, model_type="llama", directions={"15": [1, 2.5], "3": [0, 1]}, explained_variances={"15": 1})
    vector = SteeringVector.load(path)
    assert rows(vector) == {"pre_attn:3": [0.0, 1.0], "pre_attn:15": [1.0, 2.5]}
    assert (vector.metadata.base_model, vector.metadata.source) == ("llama", "v.svec")
    assert vector.metadata.extra["layer_N"] == "pre_attn of block N, as IBM's activation-steering applies it"


def test_the_user_or_the_file_says_where_svec_layers_act(tmp_path: Path) -> None:
    path = svec(tmp_path, directions={"3": [[0, 1]]})
    with pytest.raises(SteeringError, match="hook_point: is missing: AISteer360 writes this shape"):
        SteeringVector.load(path)
    for hook in ("pre_attn", "post_block"):
        vector = SteeringVector.load(path, hook=hook)
        assert rows(vector) == {f"{hook}:3": [0.0, 1.0]}
        assert vector.metadata.extra["layer_N"] == f"{hook} of block N, as the reader was told"
    path = svec(tmp_path, directions={"3": [[0, 1]]}, hook_point="post_block")
    assert (
        rows(SteeringVector.load(path))
        == rows(SteeringVector.load(path, hook="post_block"))
        == {"post_block:3": [0.0, 1.0]}
    )
    with pytest.raises(SteeringError, match="the file says post_block, the caller pre_attn"):
        SteeringVector.load(path, hook="pre_attn")
    with pytest.raises(SteeringError, match="hook_point: is 'middle', want one of"):
        SteeringVector.load(svec(tmp_path, directions={"3": [1]}, hook_point="middle"))


def test_a_hook_is_for_files_that_do_not_say_it_themselves(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    SteeringVector({Site(1, HookPoint.POST_BLOCK): [1.0]}).save(path)
    with pytest.raises(SteeringError, match=r"hook: can be given for \.svec files alone"):
        SteeringVector.load(path, hook="pre_attn")
    with pytest.raises(SteeringError, match="hook: got 'nowhere'; want one of"):
        SteeringVector.load(svec(tmp_path, directions={"3": [1]}), hook="nowhere")


def test_an_svec_vector_steers_as_the_library_that_writes_it_does(tmp_path: Path) -> None:
    """That library wraps a decoder layer and adds to the hidden states it is called with."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab import SteeredModel

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 3
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    handle = model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] + direction, *args[1:]))
    with torch.no_grad():
        expected = model.generate(ids, do_sample=False, max_new_tokens=12)[0, 5:].tolist()
    handle.remove()
    with torch.no_grad():
        plain = model.generate(ids, do_sample=False, max_new_tokens=12)[0, 5:].tolist()
    vector = SteeringVector.load(svec(tmp_path, directions={"1": direction.tolist()}))
    steering = {"interventions": [{"kind": "add", "vector": vector}]}
    with SteeredModel(model) as steered:
        (found,) = steered.generate([ids[0].tolist()], steering, max_new_tokens=12, do_sample=False)
    assert list(found.token_ids) == expected != plain


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "directions: is missing"),
        ({"directions": []}, "directions: is missing"),
        ({"directions": {}}, "at least one site"),
        ({"directions": {"x": [1.0]}}, "directions.x: is not a layer"),
        ({"directions": {"-1": [1.0]}}, "is not a layer"),
        ({"directions": {"9999999": [1.0]}}, "is not a layer"),
        ({"directions": {"1": [[1.0], [2.0]]}}, "holds directions for 2 token positions"),
        ({"directions": {"1": [[[1.0]]]}, "hook_point": "pre_attn"}, "want a finite number"),
        ({"directions": {"1": "ab"}}, "an array of"),
        ({"directions": {"1": None}}, "an array of object"),
        ({"directions": {"1": [float("nan")]}}, "finite"),
        ({"directions": {"1": [1.0]}, "num_heads": 8, "head_dim": 4}, "belong to attention heads"),
    ],
)
def test_an_svec_file_without_usable_directions_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        SteeringVector.load(svec(tmp_path, **content))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"directions": {"1": [1.0], "1": [2.0]}}']
)
def test_an_svec_file_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "v.svec").write_bytes(text)
    with pytest.raises(SteeringError) as refusal:
        SteeringVector.load(tmp_path / "v.svec")
    assert refusal.value.field == str(tmp_path / "v.svec")


def test_a_folder_of_layer_files_is_read(tmp_path: Path) -> None:
    torch.save(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), tmp_path / "layer_9.pt")
    torch.save(torch.tensor([3.0, 4.0], dtype=torch.float64), tmp_path / "layer_10.pt")
    (tmp_path / "notes.txt").write_text("not a vector")
    vector = SteeringVector.load(tmp_path)
    assert {str(site): row.tolist() for site, row in vector.directions.items()} == {
        "post_block:9": [1.0, 2.0],
        "post_block:10": [3.0, 4.0],
    }
    np.testing.assert_array_equal(vector.directions[Site(9, HookPoint.POST_BLOCK)], [1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("layer_1.pt", {"dir": torch.ones(2)}, "layer_1.pt: holds dict"),
        ("layer_1.pt", torch.ones(2, 2), r"has shape \[2, 2\]"),
        ("layer_1.pt", torch.ones(2, dtype=torch.int64), "floating-point"),
        ("layer_1.pt", torch.tensor([1.0, float("inf")]), "finite"),
        ("layer_01.pt", torch.ones(2), "is not named layer_N.pt"),
        ("steer.pt", torch.ones(2), "is not named layer_N.pt"),
    ],
)
def test_a_folder_with_anything_else_in_its_pt_files_is_refused(
    tmp_path: Path, name: str, content: Any, words: str
) -> None:
    torch.save(content, tmp_path / name)
    with pytest.raises(SteeringError, match=words):
        SteeringVector.load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SteeringError, match=r"holds no layer_N\.pt"):
        SteeringVector.load(tmp_path)


class _Trap:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("dump", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, dump: Any) -> None:
    witness = tmp_path / "ran"
    folder = tmp_path / "vectors"
    folder.mkdir()
    dump(_Trap(witness), folder / "layer_1.pt")
    with pytest.raises(SteeringError, match="cannot be read as a steering vector") as refusal:
        SteeringVector.load(folder)
    assert "\n" not in str(refusal.value)
    assert not witness.exists()
    with contextlib.suppress(Exception):
        torch.load(folder / "layer_1.pt", weights_only=False)
    assert witness.exists()  # the trap is a real one
