"""What a front end admits an engine core takes: else an answer would end in an error of the core."""

import itertools
from typing import Any

import numpy as np
import pytest

from trimtab.engines.vllm.carried import Carried, _check_served
from trimtab.engines.vllm.frontend.accounts import Account
from trimtab.engines.vllm.frontend.admission import FrontEnd, Monitor
from trimtab.engines.vllm.frontend.pending import Pending
from trimtab.errors import SteeringError
from trimtab.program.codec import decode
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.serving.registry import VectorRegistry
from trimtab.serving.server_default import ServerDefault
from trimtab.sites import GateLimits, HookPoint, ModelSites, OwnGate, Site
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.vectors.vector import SteeringVector

H, LAYERS = 4, 4
SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS)]
GENERATOR = np.random.default_rng(0)
VECTORS = {
    name: SteeringVector({site: GENERATOR.normal(size=H).tolist() for site in sites})
    for name, sites in {"early": SITES[:1], "late": SITES[2:], "all": SITES}.items()
}
PROBE = ResolvedGate.of(SteeringVector({SITES[2]: [1.0] * H}), 0.0, 1.0, label=MONITOR_LABEL)
SCHEDULES: list[Any] = [None, {"decay": 0.9}, {"ramp": [2, 9]}]


def front_end(gates: int, read: list[Site], stages: tuple[int, ...], monitored: bool) -> FrontEnd:
    own = OwnGate(PROBE.digest, PROBE.site) if monitored else None
    limits = GateLimits(gates, frozenset(read if gates else ()), stages, own)
    model = ModelSites(H, LAYERS, frozenset(SITES), limits)
    return FrontEnd(model, VectorRegistry(VECTORS), monitor=Monitor(PROBE, {}) if monitored else None)


def scheduled(vector: str, schedule: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": vector} | ({} if schedule is None else {"schedule": schedule})


def carried(doors: FrontEnd, *steps: dict[str, Any]) -> Carried:
    """What travels with a request of three tokens, as the engine core has checked it."""
    admitted = doors.admit({"interventions": steps})
    placed = admitted.place(PromptTokens(3, [3, 4, 5])) if isinstance(admitted, Pending) else admitted
    assert placed is not None
    known = {vector.digest: vector for vector in (*VECTORS.values(), PROBE.probe)}
    _check_served(decode(dict(placed), known), doors.model)
    return placed


@pytest.mark.parametrize("monitored", [False, True])
@pytest.mark.parametrize("stages", [(), (2,)])
@pytest.mark.parametrize("read", [SITES, SITES[2:]])
@pytest.mark.parametrize("gates", [0, 1, 2, 4])
def test_what_is_admitted_is_taken(gates: int, read: list[Site], stages: tuple[int, ...], monitored: bool) -> None:
    doors = front_end(gates, read, stages, monitored)
    taken = 0
    for vectors in itertools.combinations_with_replacement(VECTORS, 2):
        for schedules in itertools.product(SCHEDULES, repeat=2):
            steps = [scheduled(*one) for one in zip(vectors, schedules, strict=True)]
            for asked in (steps[:1], steps):
                try:
                    carried(doors, *asked)
                    taken += 1
                except SteeringError as error:  # the core's field is the whole of `steering`
                    if not error.field.startswith("steering.interventions"):
                        raise
    assert taken


def test_a_lone_schedule_needs_no_gate_wherever_gates_can_be_read() -> None:
    """It is its row's own: neither a probe's site before it, nor stages, nor a number of gates are asked for."""
    for gates, stages in itertools.product((0, 4), ((), (2,))):
        placed = carried(front_end(gates, SITES[2:], stages, False), scheduled("all", SCHEDULES[1]))
        assert not Account(placed).gated  # no worker has anything to tell of it


def test_an_answer_that_ended_before_its_first_token_has_no_steered_tokens() -> None:
    placed = carried(front_end(4, SITES, (), False), scheduled("all", SCHEDULES[1]))
    account = Account(placed)
    account.begun()
    account.finished(placed, 3, [], [3, 4, 5])
    assert account.complete
    assert account.receipt["steered_tokens"] == {"prefill": 0, "decode": 0}


def test_a_default_that_fades_is_not_binding() -> None:
    spec = {"interventions": [scheduled("all", SCHEDULES[1])]}
    assert not ServerDefault.parse({**spec, "binding": False}).binding
    for given in (spec, {**spec, "binding": True}):
        with pytest.raises(SteeringError, match=r"^interventions\[0\]\.schedule: cannot be in a default that is bind"):
            ServerDefault.parse(given)
