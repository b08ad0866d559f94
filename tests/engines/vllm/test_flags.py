"""The steering flags, on a plain argparse parser: vLLM is not needed."""

import argparse
import json
from pathlib import Path

import pytest

from trimtab.engines.vllm.settings.flags import add_flags, apply_flags
from trimtab.errors import SteeringError


def parse(*flags: str, additional_config: dict | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--additional-config", default=additional_config or {})
    add_flags(parser)
    return parser.parse_args(list(flags))


def test_without_flags_nothing_is_configured():
    args = parse()
    assert apply_flags(args) is False
    assert args.additional_config == {}


def test_the_enable_flag_alone_turns_steering_on_with_defaults():
    args = parse("--enable-steering")
    assert apply_flags(args) is True
    assert args.additional_config == {"steering": {}}


def test_every_flag_reaches_its_setting(tmp_path: Path):
    spec = {"interventions": [{"kind": "add", "vector": "calm"}]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    (tmp_path / "monitor.json").write_text('{"probe": "anger.safetensors", "threshold": 2}')
    args = parse(
        "--enable-steering", "--steering-vectors", "calm=/v/calm.safetensors", "joy=/v/a=b.gguf",
        "--steering-layers", "8-24", "--steering-hook-points", "post_block,pre_attn", "mlp_out",
        "--steering-max-rows", "64", "--steering-table-memory", "64MiB",
        "--steering-default", str(tmp_path / "spec.json"), "--steering-backend", "traced",
        "--steering-norms", "/v/calm.safetensors",
        "--steering-slots", "2", "--steering-slot-layers", "9-12", "--steering-kinds", "clamp,scale", "swap",
        "--steering-row-monitor", "--steering-monitor", str(tmp_path / "monitor.json"),
        additional_config={"other": 1},
    )  # fmt: skip
    assert apply_flags(args) is True
    assert args.additional_config == {
        "other": 1,
        "steering": {
            "vectors": {"calm": "/v/calm.safetensors", "joy": "/v/a=b.gguf"},
            "layers": "8-24",
            "hook_points": ["post_block", "pre_attn", "mlp_out"],
            "max_rows": 64,
            "table_memory": "64MiB",
            "norms": "/v/calm.safetensors",
            "slots": 2,
            "slot_layers": "9-12",
            "kinds": ["clamp", "scale", "swap"],
            "row_monitor": True,
            "monitor": {"probe": str(tmp_path / "anger.safetensors"), "threshold": 2},
            "default": spec,
            "backend": "traced",
        },
    }


def test_a_second_application_changes_nothing_even_if_the_default_file_has_gone(tmp_path: Path):
    file = tmp_path / "spec.json"
    file.write_text('{"interventions": []}')
    args = parse("--enable-steering", "--steering-default", str(file))
    apply_flags(args)
    before = json.dumps(args.additional_config)
    file.unlink()
    assert apply_flags(args) is True
    assert json.dumps(args.additional_config) == before


def test_relative_vector_files_become_absolute_because_workers_may_run_elsewhere(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse("--enable-steering", "--steering-vectors", "calm=calm.safetensors")
    apply_flags(args)
    assert args.additional_config["steering"]["vectors"]["calm"] == str(tmp_path / "calm.safetensors")


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        (["--steering-layers", "8-24"], "--steering-layers", "without --enable-steering"),
        (["--enable-steering", "--steering-vectors", "calm"], "--steering-vectors", "NAME=FILE"),
        (["--enable-steering", "--steering-vectors", "=f"], "--steering-vectors", "NAME=FILE"),
        (["--enable-steering", "--steering-vectors", "a=f", "a=g"], "--steering-vectors", "twice"),
        (["--enable-steering", "--steering-hook-points", "resid_pre"], "--steering-hook-points", "post_block"),
        (["--enable-steering", "--steering-default", "/no/such.json"], "--steering-default", "cannot be read"),
        (["--enable-steering", "--steering-monitor", "/no/such.json"], "--steering-monitor", "cannot be read"),
    ],
)
def test_a_bad_flag_is_refused_by_name(flags: list[str], field: str, words: str):
    with pytest.raises(SteeringError, match=words) as caught:
        apply_flags(parse(*flags))
    assert field in caught.value.field


@pytest.mark.parametrize("content", ["not json", "[1, 2]"])
def test_a_default_that_is_no_json_object_is_refused(tmp_path: Path, content: str):
    (tmp_path / "spec.json").write_text(content)
    with pytest.raises(SteeringError, match="JSON"):
        apply_flags(parse("--enable-steering", "--steering-default", str(tmp_path / "spec.json")))


def test_settings_given_both_ways_are_refused():
    args = parse("--enable-steering", "--steering-layers", "1", additional_config={"steering": {"layers": "2"}})
    with pytest.raises(SteeringError, match="one of the two"):
        apply_flags(args)
    assert apply_flags(parse("--enable-steering", additional_config={"steering": {"layers": "2"}})) is True
