"""What is told to whoever registers content that no request could use."""

from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.engines.vllm.http.registry_routes import check_probe
from trimtab.errors import SteeringError
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site
from trimtab.vectors.probe import Probe

SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(4))
PROBE = Probe.at(Site(2, HookPoint.POST_BLOCK), [1.0, 2.0])


def front_end(gates: GateLimits) -> Any:
    return SimpleNamespace(model=ModelSites(2, 4, SITES, gates))


def test_a_probe_for_an_engine_that_reads_none_is_told_how_to_start_it() -> None:
    with pytest.raises(SteeringError) as refusal:
        check_probe(PROBE, front_end(GateLimits()))
    assert refusal.value.field == "probe"
    assert "start it with --steering-probe-layers 2" in refusal.value.message
    assert "leave the gate out" not in refusal.value.message


def test_a_probe_at_a_site_that_is_not_read_is_told_which_are() -> None:
    other = GateLimits(4, frozenset({Site(1, HookPoint.POST_BLOCK)}))
    with pytest.raises(SteeringError, match="no probe can be read at post_block:2 here, only at post_block:1"):
        check_probe(PROBE, front_end(other))
    check_probe(PROBE, front_end(GateLimits(4, SITES)))
