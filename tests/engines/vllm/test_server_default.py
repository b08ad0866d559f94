"""What a server's default promises: a binding one stands, one that is not is counted, and receipts tell the truth."""

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from trimtab.engines.vllm.carried import Carried
from trimtab.engines.vllm.frontend.admission import FrontEnd, Monitor
from trimtab.engines.vllm.frontend.start_log import _short
from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.serving.registry import ProbeRegistry, VectorRegistry
from trimtab.serving.server_default import ServerDefault
from trimtab.sites import GateLimits, HookPoint, ModelSites, OwnGate, Site, SlotLimits
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

WIDTH, LAYERS = 8, 4
SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS))
MODEL = ModelSites(WIDTH, LAYERS, SITES, GateLimits(4, frozenset({Site(0, HookPoint.POST_BLOCK)})))
ANGER = Probe.at(Site(0, HookPoint.POST_BLOCK), [1.0] * WIDTH)


def vector(seed: int) -> SteeringVector:
    numbers = np.random.default_rng(seed).normal(size=(LAYERS, WIDTH))
    return SteeringVector({Site(layer, HookPoint.POST_BLOCK): numbers[layer] for layer in range(LAYERS)})


CALM, JOY = vector(1), vector(2)
GATE = {"probe": "anger", "threshold": 1.0}


def add(source: Any, **more: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": source, **more}


def spec(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"interventions": list(steps), **more}


def front_end(default: Any, model: ModelSites = MODEL) -> FrontEnd:
    vectors, probes = VectorRegistry({"calm": CALM, "joy": JOY}), ProbeRegistry({"anger": ANGER})
    return FrontEnd(model, vectors, default, probes=probes)


def admitted(front: FrontEnd, given: Any) -> Carried:
    admission = front.admit(given)
    assert admission is not None
    return admission


@pytest.mark.parametrize(
    ("own", "index"),
    [
        ([add("calm", scale=-1.0)], 0),
        ([add(CALM, scale=-1.0)], 0),
        ([add("joy"), add("calm", scale=-0.3), add("calm", scale=-0.3), add(CALM, scale=-0.4)], 3),
        ([add("calm", scale=-1.0, layers=[2])], 0),
        ([add("calm", scale=-1.0, phase="decode")], 0),
        ([add("calm", scale=-1.0, gate=GATE)], 0),
        ([add("calm", scale=-50.0)], 0),
    ],
)
def test_a_binding_default_cannot_be_taken_back(own: list[dict[str, Any]], index: int) -> None:
    with pytest.raises(SteeringError, match=r"server's default spec \(calm\), which is binding") as caught:
        front_end(spec(add("calm"))).admit(spec(*own))
    assert caught.value.field == f"steering.interventions[{index}]"


def test_what_leaves_half_of_it_is_admitted_and_says_how_much_is_left() -> None:
    front = front_end(spec(add("calm"), binding=True))
    assert admitted(front, None).receipt["default_left"] == 1.0
    assert admitted(front, spec(add("calm", scale=-0.5))).receipt["default_left"] == 0.5
    assert admitted(front, spec(add("calm", scale=3.0))).receipt["default_left"] == 1.0
    with pytest.raises(SteeringError, match=r"0\.49 of what it adds"):
        front.admit(spec(add("calm", scale=-0.51)))
    assert admitted(front_end(spec(add("calm", phase="decode"))), spec(add("calm", scale=-1, phase="prefill")))


def test_a_default_that_is_not_binding_may_be_taken_back_and_the_receipt_says_so() -> None:
    front = front_end(spec(add("calm"), binding=False))
    gone = admitted(front, spec(add("calm", scale=-1.0))).receipt
    assert gone["default_left"] == 0.0
    assert gone["server_default"] is True
    assert (gone["identity"], gone["sites"], gone["vectors"]) == ({"prefill": "", "decode": ""}, [], [])
    assert admitted(front, spec(add("calm", scale=-3.0))).receipt["default_left"] == -2.0
    assert admitted(front, None).receipt["default_left"] == 1.0


def test_a_default_behind_a_gate_is_binding_too() -> None:
    front = front_end(spec(add("calm", gate=GATE)))
    for own in (add("calm", scale=-1.0), add("calm", scale=-1.0, gate=GATE)):
        with pytest.raises(SteeringError, match="binding"):
            front.admit(spec(own))
    assert admitted(front, spec(add("joy", gate=GATE))).receipt["default_left"] <= 1.0


def test_a_push_behind_the_monitor_makes_up_for_nothing_that_is_taken_back_before_it() -> None:
    """The monitor may be half open, and a push behind it half of what it is; what stands before it is not."""
    site = Site(1, HookPoint.POST_BLOCK)
    monitor = Monitor(ResolvedGate.of(Probe.at(site, [0.0, 1.0]).vector, 0.0, 1.0, label=MONITOR_LABEL), {})
    sites = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(3))
    model = ModelSites(2, 3, sites, GateLimits(2, sites, monitor=OwnGate(monitor.gate.digest, site)))
    late = SteeringVector({Site(2, HookPoint.POST_BLOCK): [1.0, 0.0]})
    front = FrontEnd(model, VectorRegistry({"late": late}), spec(add("late")), monitor=monitor)

    def step(layer: int, scale: float) -> dict[str, Any]:
        return add({"post_block": {str(layer): [scale, 0.0]}}, phase="decode")

    with pytest.raises(SteeringError, match="takes back too much of the server's default"):
        front.admit(spec(step(0, -20.0), step(2, 19.5)))
    assert front.admit(spec(step(0, -0.25), step(2, -0.25))).receipt["default_left"] == 0.5


def test_a_monitor_changes_nothing_about_the_promise() -> None:
    monitor = Monitor(ResolvedGate.of(ANGER.vector, 0.0, 1.0, label=MONITOR_LABEL), {})
    vectors, probes = VectorRegistry({"calm": CALM, "joy": JOY}), ProbeRegistry({"anger": ANGER})
    front = FrontEnd(MODEL, vectors, spec(add("calm", phase="decode")), probes=probes, monitor=monitor)
    with pytest.raises(SteeringError, match="binding"):
        front.admit(spec(add("calm", scale=-1.0)))
    assert admitted(front, spec(add("calm", scale=-0.5))).receipt["default_left"] == 0.5
    assert admitted(front, spec(add("calm", scale=3.0))).receipt["default_left"] == 1.0
    told = admitted(front, None).receipt
    assert told["monitor"] == monitor.gate.digest.hex()
    assert told["vectors"] == [{"name": "calm", "digest": CALM.digest.hex()}]
    assert told["probes"] == []


def test_only_the_servers_default_says_whether_it_is_binding() -> None:
    with pytest.raises(SteeringError) as caught:
        front_end(spec(add("calm"))).admit(spec(add("joy"), binding=False))
    assert caught.value.field == "steering.binding"
    with pytest.raises(SteeringError, match=r"steering\.default\.binding: got 'no', want true or false"):
        front_end(spec(add("calm"), binding="no"))
    front = front_end(spec(add("calm"), binding=False))
    assert front.default is not None
    assert front.default.shown()["binding"] is False


def test_a_default_cannot_name_what_may_change_while_the_server_runs() -> None:
    vectors, probes = VectorRegistry({"calm": CALM}), ProbeRegistry({})
    vectors.add("mood", JOY)
    probes.add("anger", ANGER)
    for given, path in ((spec(add("mood")), "vector"), (spec(add("calm", gate=GATE)), r"gate\.probe")):
        with pytest.raises(SteeringError, match=rf"interventions\[0\]\.{path}.*registered at run time"):
            FrontEnd(MODEL, vectors, given, probes=probes)


@pytest.mark.parametrize("default", [spec(add("calm", scale=0.0)), spec(add("calm"), add(CALM, scale=-1.0))])
def test_a_default_that_adds_nothing_stops_the_start(default: Any) -> None:
    with pytest.raises(SteeringError, match="default spec: interventions: adds nothing"):
        front_end(default)


def test_a_spec_that_adds_nothing_is_admitted_and_its_receipt_names_nothing() -> None:
    front = front_end(None)
    for own in ([add("calm", scale=0.0)], [add("calm"), add(CALM, scale=-1.0)], [add("calm", scale=0.0, gate=GATE)]):
        receipt = admitted(front, spec(*own)).receipt
        assert receipt["identity"] == {"prefill": "", "decode": ""}
        assert (receipt["sites"], receipt["vectors"], receipt["probes"]) == ([], [], [])
        assert "default_left" not in receipt
    partly = admitted(front, spec(add("calm"), add("joy"), add(JOY, scale=-1.0), add("calm", layers=[1]))).receipt
    assert [entry["name"] for entry in partly["vectors"]] == ["calm"]
    gated = admitted(front, spec(add("joy", gate=GATE, layers=[1, 2]))).receipt
    assert [entry["digest"] for entry in gated["vectors"]] == [JOY.digest.hex()]
    assert [entry["name"] for entry in gated["probes"]] == ["anger"]


SLOTTED = replace(MODEL, slots=SlotLimits(2, SITES, frozenset({"ablate", "clamp"})))


def slot(kind: str, source: Any, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "vector": source, **more}


def test_a_default_may_hold_any_kind_and_stands_beside_what_requests_ask_for() -> None:
    front = front_end(spec(slot("clamp", "calm", max=1.0), binding=False), SLOTTED)
    assert admitted(front, None).receipt["default_left"] == 1.0
    both = admitted(front, spec(slot("ablate", "joy", layers=[1]), add("calm", scale=-3.0, layers=[0])))
    assert [len(program.slots) for program in both.steering.programs] == [2, 2]
    assert {vector["name"] for vector in both.receipt["vectors"]} == {"calm", "joy"}
    assert both.receipt["default_left"] == 0.0  # of what slots do nothing is measured


def test_beside_the_slots_of_a_binding_default_no_request_acts() -> None:
    front = front_end(spec(slot("clamp", "calm", max=1.0, phase="decode")), SLOTTED)
    assert admitted(front, None).receipt["default_left"] == 1.0
    assert admitted(front, spec(add("calm", scale=-3.0, phase="prefill"))).receipt["default_left"] == 1.0
    with pytest.raises(SteeringError, match="binding and does more than add") as caught:
        front.admit(spec(add("joy", scale=0.1)))
    assert caught.value.field == "steering.interventions"


@pytest.mark.parametrize("binding", [True, False])
def test_norms_that_a_request_keeps_are_kept_at_the_defaults_sites(binding: bool) -> None:
    kept = replace(MODEL, slots=SlotLimits(2, SITES, frozenset({"keep_norm"})))
    front = front_end(spec(add("calm"), binding=binding), kept)
    given = spec(add("joy", scale=0.0), keep_norm="if_grown")
    if not binding:
        assert admitted(front, given).receipt["default_left"] == 0.0
        return
    unmeasured = mock.patch("trimtab.serving.server_default.least_share", side_effect=AssertionError("measured"))
    with unmeasured, pytest.raises(SteeringError, match="keep norms") as caught:
        front.admit(given)
    assert caught.value.field == "steering.keep_norm"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (slot("clamp", "calm", value=3.0), "ask for different things"),
        (slot("ablate", vector(3), layers=[1], strength=0.5), "has 3 slots at post_block:1 .* --steering-slots 3"),
    ],
    ids=["contradiction", "count"],
)
def test_slots_of_a_default_hold_at_their_sites_and_count(own: dict[str, Any], said: str) -> None:
    front = front_end(spec(slot("clamp", "calm", max=1.0), slot("ablate", "joy"), binding=False), SLOTTED)
    with pytest.raises(SteeringError, match=f"together with the server's default spec: .*{said}"):
        front.admit(spec(own))
    assert admitted(front, spec(add("calm", scale=9.0)))


@pytest.mark.parametrize("binding", [True, False])
def test_a_request_that_takes_the_defaults_direction_out_takes_it_back(binding: bool) -> None:
    front = front_end(spec(add("calm"), binding=binding), SLOTTED)
    assert admitted(front, spec(slot("ablate", "joy", layers=[3], strength=0.1))).receipt["default_left"] > 0.8
    taking = spec(add("joy"), slot("ablate", "calm", layers=[2]))
    if not binding:
        assert admitted(front, taking).receipt["default_left"] < 0.5
        return
    with pytest.raises(SteeringError, match="takes back too much of the server's default spec") as caught:
        front.admit(taking)
    assert caught.value.field == "steering.interventions[1]"


def test_the_start_log_shows_every_probe_of_a_default_behind_a_gate_of_several() -> None:
    members = [{"probe": "anger", "threshold": 1.0, "hard": True}, {"probe": ANGER, "threshold": 0.0}]
    default = ServerDefault.parse(spec({**add("calm"), "gate": {"any": members}}))
    (step,) = _short(default)["interventions"]
    inline = {"probe": f"inline {ANGER.digest.hex()}", "threshold": 0.0}
    assert step["gate"] == {"any": [members[0], inline]}
    assert json.loads(json.dumps(step)) == step
