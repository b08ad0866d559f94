"""The setting of a monitor: what it comes to, and what is refused at start, on a configuration that is made up."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab import Probe
from trimtab.engines.vllm.settings.config import SteeringSettings, model_sites, stamped
from trimtab.engines.vllm.settings.monitor import check_reach
from trimtab.engines.vllm.settings.tables import stamped_tables
from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import ResolvedGate, rows_needed
from trimtab.sites import HookPoint, OwnGate, Site

WIDTH, LAYERS = 4, 6
SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS)]


def engine(width: int = WIDTH) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS), get_hidden_size=lambda: width, dtype=torch.float32
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


@pytest.fixture
def probe(tmp_path: Path):
    def saved(site: Site = SITES[2], bias: float = 0.5) -> str:
        path = tmp_path / f"{site.hook.value}-{site.layer}.safetensors"
        Probe.at(site, [1.0, -2.0, 0.5, 0.0], bias).save(path)
        return str(path)

    return saved


def settings(monitor: Any, **more: Any) -> SteeringSettings:
    return SteeringSettings.parse({"monitor": monitor} | more)


def test_a_monitor_is_its_probe_with_the_numbers_of_a_gate(probe) -> None:
    given = settings({"probe": probe(), "threshold": 2, "sharpness": 3.0, "invert": True})
    gate = given.start_monitor
    assert (gate.site, gate.threshold, gate.sharpness, gate.invert) == (SITES[2], 1.5, 3.0, True)
    limits = model_sites(engine(), given).gates
    assert limits.monitor == OwnGate(gate.digest, SITES[2])
    assert (limits.count, limits.probe_sites) == (0, frozenset())  # of itself it serves no gates
    assert (limits.per_token, limits.read_sites) == (1, {SITES[2]})
    assert model_sites(engine(), SteeringSettings()).gates.monitor is None


def test_a_monitor_is_one_gate_more_than_the_setting_and_takes_none_from_requests(probe) -> None:
    monitor = {"probe": probe(), "threshold": 2.0}
    for more, count in (({}, 0), ({"probe_layers": [1], "gates": 3}, 3)):
        plain, given = SteeringSettings.parse(more), settings(monitor, **more)
        limits = model_sites(engine(), given).gates
        assert (limits.count, limits.per_token) == (count, count + 1)
        assert limits.probe_sites == model_sites(engine(), plain).gates.probe_sites
        rows = [stamped_tables(stamped(engine(), one).stamp).rows for one in (given, plain)]
        assert rows[0] == rows_needed(2, count + 1) > rows[1]


def test_the_stamp_tells_engines_with_different_monitors_apart(probe) -> None:
    path = probe()
    first = stamped(engine(), settings({"probe": path, "threshold": 2.0}))
    assert SteeringSettings.parse(first.model_dump()).start_monitor is not None
    probe(bias=0.75)  # the same file with another content
    other = stamped(engine(), settings({"probe": path, "threshold": 2.0}))
    assert first.monitor == other.monitor
    assert first.stamp["monitor"] != other.stamp["monitor"] != ""
    assert stamped(engine(), SteeringSettings()).stamp["monitor"] == ""


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"threshold": None}, "steering.monitor.threshold", "want a number"),
        ({"sharpness": 0.0}, "steering.monitor.sharpness", "want a number from 1.2e-38 on"),
        ({"hard": True}, "steering.monitor.hard", "the settings are invert, probe, sharpness, threshold"),
        ({"probe": "/nowhere/x.safetensors"}, "steering.monitor.probe", "cannot be loaded"),
    ],
)
def test_what_a_monitor_cannot_be_is_refused_by_name(probe, change: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(SteeringError, match=words) as caught:
        model_sites(engine(), settings({"probe": probe(), "threshold": 0.0} | change))
    assert caught.value.field == field


def test_a_monitor_is_read_where_the_engine_steers(probe) -> None:
    numbers = {"threshold": 0.0}
    with pytest.raises(SteeringError, match="post_block:2, which is not among the steered") as caught:
        model_sites(engine(), settings({"probe": probe()} | numbers, layers="3-5"))
    assert caught.value.field == "steering.monitor.probe"
    with pytest.raises(SteeringError, match="has width 4, this model has hidden size 8"):
        model_sites(engine(8), settings({"probe": probe()} | numbers))


def test_a_monitor_that_would_miss_later_pipeline_stages_is_refused_with_the_boundary_named() -> None:
    def monitor(layer: int) -> ResolvedGate:
        return ResolvedGate.of(Probe.at(SITES[layer], [1.0] * WIDTH).vector, 0.0, 1.0)

    stages = (2, 4)
    check_reach(monitor(4), SITES, stages)
    check_reach(monitor(1), SITES[:2], stages)
    check_reach(monitor(0), SITES, ())
    with pytest.raises(
        SteeringError, match=r"post_block:1, and post_block:2 .* before layer 2: .* at layer 4 or later"
    ):
        check_reach(monitor(1), SITES, stages)
    with pytest.raises(SteeringError, match=r"post_block:3, and post_block:4 .* before layer 4"):
        check_reach(monitor(3), SITES, stages)


def test_the_row_monitor_is_in_the_stamp_and_refused_where_no_probe_can_be_read() -> None:
    for more in ({}, {"row_monitor": True}):
        found = stamped(engine(), SteeringSettings.parse({"probe_layers": [2]} | more))
        assert found.stamp is not None
        assert found.stamp["row_monitor"] == bool(more)
    for given in ({}, {"gates": 0}):
        with pytest.raises(SteeringError, match=r"steering\.row_monitor: no probe can be read here.* `probe_layers`"):
            stamped(engine(), SteeringSettings.parse(given | {"row_monitor": True}))
