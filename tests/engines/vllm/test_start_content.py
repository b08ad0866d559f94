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
from trimtab.vectors.probe import Probe
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
