"""Files in an engine's settings: each process reads them once, and none serves anything else than another."""

import copy
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.engines.vllm.core import checks
from trimtab.engines.vllm.frontend.build import build_front_end
from trimtab.engines.vllm.settings import stamp
from trimtab.engines.vllm.settings.travelling import Travelling
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.probe import Probe
from trimtab.vectors.stream_norms import StreamNorms
from trimtab.vectors.vector import SteeringVector

pytestmark = pytest.mark.vllm

H, LAYERS = 4, 2
SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS)]
FILES = {"calm": SteeringVector({SITES[1]: [1.0] * H}), "anger": Probe.at(SITES[0], [2.0] * H, 0.5)}
FILES["watch"] = Probe.at(SITES[0], [3.0] * H)
OTHERS = {"calm": SteeringVector({SITES[1]: [5.0] * H}), "anger": Probe.at(SITES[0], [2.0] * H, 0.75)}
OTHERS["watch"] = Probe.at(SITES[0], [4.0] * H)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What trimtab reads of a new `VllmConfig`."""
    monkeypatch.delenv("TRIMTAB_REGISTRY_DIR", raising=False)
    monkeypatch.setattr(stamp, "require_steerable", lambda config: None)
    monkeypatch.setattr(Travelling, "arrive", Travelling)  # without the patches
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in FILES}
    for name, content in FILES.items():
        content.save(paths[name])
    settings = {
        "vectors": {"calm": paths["calm"]},
        "probes": {"anger": paths["anger"]},
        "monitor": {"probe": paths["watch"], "threshold": 1.0},
    }
    return SimpleNamespace(
        additional_config={"steering": settings, "other": 1},
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS), get_hidden_size=lambda: H, dtype=torch.float32
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read."""
    counted: Counter[str] = Counter()

    for kind in (SteeringVector, Probe):
        original = kind.load

        def load(path: str, original: Any = original) -> Any:
            counted[Path(path).stem] += 1
            return original(path)

        monkeypatch.setattr(kind, "load", load)
    return counted


def elsewhere(config: Any) -> Any:
    """The configuration as another process gets it."""
    travelled = pickle.loads(pickle.dumps(config.additional_config))
    return SimpleNamespace(**{**vars(config), "additional_config": travelled})


def serve(config: Any) -> None:
    """All that asks for settings in a process that is front end, engine core and worker at once."""
    assert build_front_end(config) is not None
    served = checks.served_by(SimpleNamespace(vllm_config=config))
    assert served is not None
    assert served[0] is stamp.stamped_settings(config)  # a worker asks for these


def test_each_process_reads_each_file_once(config: Any, reads: Counter[str]) -> None:
    once = dict.fromkeys(FILES, 1)
    stamp.prepare_config(config)
    serve(config)
    assert reads == once
    other = elsewhere(config)
    assert type(other.additional_config) is type(config.additional_config)
    assert other.additional_config == config.additional_config
    reads.clear()
    checks.served_by(SimpleNamespace(vllm_config=other))  # an engine core has all before its first request
    assert reads == once
    serve(other)
    assert reads == once


@pytest.mark.parametrize("changed", list(FILES))
def test_a_process_whose_file_holds_something_else_does_not_start(changed: str, config: Any, tmp_path: Path) -> None:
    stamp.prepare_config(config)
    OTHERS[changed].save(tmp_path / f"{changed}.safetensors")
    for start in (build_front_end, stamp.stamped_settings):
        with pytest.raises(SteeringError, match="here than where the engine was configured") as caught:
            start(elsewhere(config))
        assert changed in caught.value.message
    assert stamp.stamped_settings(config) is not None  # what this process has read goes on


def test_a_new_engine_reads_anew(config: Any, reads: Counter[str], tmp_path: Path) -> None:
    stamp.prepare_config(config)
    again = copy.copy(config)
    for name, content in OTHERS.items():
        content.save(tmp_path / f"{name}.safetensors")
    stamp.prepare_config(again)
    assert reads == dict.fromkeys(FILES, 2)
    assert stamp.stamped_settings(again).start_vectors["calm"] == OTHERS["calm"]
    assert stamp.stamped_settings(config).start_vectors["calm"] == FILES["calm"]


def test_workers_that_were_configured_otherwise_stop_the_start(config: Any) -> None:
    """A node makes its configuration itself; with less memory it would have fewer rows than the engine hands out."""
    stamp.prepare_config(config)
    there, alike = elsewhere(config), elsewhere(config)
    there.additional_config["steering"]["stamp"]["tables"]["rows"] -= 1
    for workers, fits in (([config, there], False), ([config, alike], True)):
        told = [stamp.stamp_digest(worker) for worker in workers]
        executor = SimpleNamespace(collective_rpc=lambda method, told=told: told)
        if fits:
            checks.check_workers(config, executor)
            continue
        with pytest.raises(SteeringError, match=r"workers \[1\] were configured in another way .*table_memory"):
            checks.check_workers(config, executor)


def norms_file(config: Any, path: Path, *, base_model: str = "", width: int = H, **norms: str) -> None:
    """Gives an engine a file of norms; a key is HOOK_LAYER."""
    extra = {f"stream_norm.{'.'.join(key.rsplit('_', 1))}": value for key, value in norms.items()}
    metadata = VectorMetadata(base_model=base_model, extra=extra)
    SteeringVector({SITES[0]: [1.0] * width}, metadata).save(path)
    config.additional_config["steering"]["norms"] = str(path)


def test_norms_are_stamped_and_the_same_where_requests_are_taken(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "norms.safetensors"
    norms_file(config, path, base_model="org/tiny", post_block_1="3.0")
    stamp.prepare_config(config)
    away = elsewhere(config)
    away.model_config = SimpleNamespace(**vars(config.model_config), model="org/other")
    front = build_front_end(away)
    assert front is not None
    assert front.norms == StreamNorms({SITES[1]: 3.0}, H, "org/tiny")
    assert "norms: measured in org/tiny, where org/other is served" in caplog.text
    given = {"interventions": [{"kind": "add", "vector": "calm", "unit": "dose"}]}
    assert front.admit(given) is not None
    told = stamp.stamp_digest(config)
    norms_file(away, path, post_block_1="4.0")
    with pytest.raises(SteeringError, match="other norms here than where the engine was configured") as caught:
        build_front_end(elsewhere(config))
    assert caught.value.field == "steering.norms"
    stamp.prepare_config(again := elsewhere(config))
    assert stamp.stamp_digest(again) != told  # so a node with another file stops the start


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ({}, "norms.safetensors cannot be loaded.*has no norms"),
        ({"post_block_1": "nan"}, "norms.safetensors cannot be loaded.*finite"),
        ({"post_block_2": "1"}, "post_block:2; the model has layers 0 to 1"),
        ({"mlp_out_1": "1"}, "has norms at mlp_out:1, and none where this engine steers"),
        ({"post_block_1": "1", "width": H + 1}, "width 5, this model has hidden size 4"),
    ],
)
def test_what_are_no_norms_of_this_model_stops_the_start(
    norms: dict[str, Any], said: str, config: Any, tmp_path: Path
) -> None:
    norms_file(config, tmp_path / "norms.safetensors", **norms)
    with pytest.raises(SteeringError, match=said) as caught:
        stamp.prepare_config(config)
    assert caught.value.field == "steering.norms"


def test_norms_that_cannot_be_read_stop_the_start(config: Any, tmp_path: Path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("junk.safetensors", "missing.safetensors"):
        config.additional_config["steering"]["norms"] = str(tmp_path / name)
        with pytest.raises(SteeringError, match=f"{name} cannot be loaded") as caught:
            stamp.prepare_config(config)
        assert caught.value.field == "steering.norms"
