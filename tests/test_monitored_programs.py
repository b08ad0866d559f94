"""What an engine's monitor does to the identity of a spec: it changes that of decode tokens which it acts on."""

import hashlib

import pytest

from trimtab.errors import SteeringError
from trimtab.program.gates import ResolvedGate, check_monitor
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site
from trimtab.spec import Steering
from trimtab.vectors import SteeringVector

SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(2))
MONITOR = ResolvedGate.of(SteeringVector({Site(0, HookPoint.POST_BLOCK): [1.0, 0.0]}), 0.5, 2.0)
PLAIN = ModelSites(2, 2, SITES, GateLimits(2, SITES))
MONITORED = ModelSites(2, 2, SITES, GateLimits(2, SITES), MONITOR.digest.hex())

STEP = {"kind": "add", "vector": {"post_block": {"1": [1.0, 2.0]}}}
GATED = {**STEP, "gate": {"probe": {"post_block": {"0": [0.0, 1.0]}}, "threshold": 0.0}}


def identities(model: ModelSites, *steps: dict) -> tuple[str, str]:
    resolved = Steering.parse({"interventions": list(steps)}).resolve({}, model)
    return resolved.identity(Phase.PREFILL), resolved.identity(Phase.DECODE)


def test_phases_steered_alike_are_not_alike_behind_a_monitor() -> None:
    plain, same = identities(PLAIN, STEP)
    prefill, decode = identities(MONITORED, STEP)
    assert plain == same == prefill
    whole = b"trimtab monitored program 1\0" + MONITOR.digest + bytes.fromhex(plain)
    assert decode == hashlib.sha256(whole).hexdigest()


def test_what_the_monitor_leaves_alone_keeps_its_identity() -> None:
    for steps in ([{**STEP, "phase": "prefill"}], [GATED]):
        assert identities(MONITORED, *steps) == identities(PLAIN, *steps)
    assert identities(MONITORED, STEP, GATED)[1] != identities(PLAIN, STEP, GATED)[1]


def test_another_monitor_is_another_identity() -> None:
    other = ResolvedGate.of(MONITOR.probe, 0.75, 2.0)
    engine = ModelSites(2, 2, SITES, monitor=other.digest.hex())
    assert identities(engine, STEP)[1] != identities(MONITORED, STEP)[1]


def test_a_hard_gate_is_no_monitor() -> None:
    check_monitor(MONITOR)
    with pytest.raises(SteeringError, match="hard: a monitor opens gradually"):
        check_monitor(ResolvedGate.of(MONITOR.probe, 0.5, None))
