"""Steering as an engine core meets it: what it reads again, what it trusts, and what it refuses."""

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from trimtab.engines.vllm.carried import Carried, Decoded, checked, held_bytes, steering_of
from trimtab.errors import SteeringError
from trimtab.program.codec import encode
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate, VectorReference
from trimtab.sites import GateLimits, HookPoint, ModelSites, OwnGate, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

WIDTH = 8
SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in range(2)]
MODEL = ModelSites(WIDTH, 2, frozenset(SITES))
CALM = SteeringVector.from_block(SITES, np.random.default_rng(1).normal(size=(2, WIDTH)))
JOY = SteeringVector.from_block(SITES, np.random.default_rng(2).normal(size=(2, WIDTH)))
SETTINGS: Any = SimpleNamespace(
    start_vectors={"calm": CALM}, start_probes={}, start_vectors_by_digest={CALM.digest: CALM}
)


PROBE = SteeringVector({SITES[1]: np.ones(WIDTH)})
MONITOR = ResolvedGate.of(PROBE, 0.5, 2.0, reference=VectorReference(MONITOR_LABEL, PROBE.digest), label=MONITOR_LABEL)
MONITORED = replace(MODEL, gates=GateLimits(monitor=OwnGate(MONITOR.digest, SITES[1])))
WITH_PROBE: Any = SimpleNamespace(
    start_vectors={"calm": CALM}, start_probes={},
    start_vectors_by_digest={CALM.digest: CALM, PROBE.digest: PROBE},
)  # fmt: skip


def admitted(vector: Any, monitor: ResolvedGate | None = None, **step: Any) -> Carried:
    spec = {"interventions": [{"kind": "add", "vector": vector, **step}]}
    resolved = Steering.parse(spec).resolve({"calm": CALM}, MODEL)
    resolved = resolved if monitor is None else behind(resolved, monitor)
    return Carried(encode(resolved, views=True), resolved)


def sent(wire: Any) -> Any:
    """What another process receives."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(wire))


@pytest.mark.parametrize("vector", ["calm", JOY], ids=["name", "content"])
def test_what_was_admitted_in_this_process_is_not_read_again_and_what_was_sent_is(vector: Any) -> None:
    wire = admitted(vector)
    here, there = checked(wire, SETTINGS, MODEL), checked(sent(wire), SETTINGS, MODEL)
    assert here.steering is wire.steering
    assert there.steering is not wire.steering
    assert here.steering == there.steering
    assert type(here) is type(there) is Carried
    assert here == there == wire


def test_what_was_admitted_for_another_engine_is_refused() -> None:
    smaller = ModelSites(WIDTH, 1, frozenset(SITES[:1]))
    with pytest.raises(SteeringError, match="not served"):
        checked(admitted(JOY), SETTINGS, smaller)


def test_what_another_engine_of_this_process_admitted_is_read_anew() -> None:
    nameless: Any = SimpleNamespace(start_vectors={}, start_probes={}, start_vectors_by_digest={})
    with pytest.raises(SteeringError, match="not registered in this process"):
        checked(admitted("calm"), nameless, MODEL)


def test_what_one_engine_took_over_another_still_checks() -> None:
    wire = admitted(JOY)
    assert checked(wire, SETTINGS, MODEL) is checked(wire, SETTINGS, MODEL)
    smaller = ModelSites(WIDTH, 1, frozenset(SITES[:1]))
    with pytest.raises(SteeringError, match="not served"):
        checked(wire, SETTINGS, smaller)
    nameless: Any = SimpleNamespace(start_vectors={}, start_probes={}, start_vectors_by_digest={})
    by_name = admitted("calm")
    checked(by_name, SETTINGS, MODEL)
    with pytest.raises(SteeringError, match="not registered in this process"):
        checked(by_name, nameless, MODEL)


@pytest.mark.parametrize("vector", ["calm", JOY], ids=["name", "content"])
@pytest.mark.parametrize("through", [lambda wire: wire, sent], ids=["here", "sent"])
def test_an_engine_takes_what_stands_behind_its_monitor_and_nothing_that_was_admitted_without_it(
    vector: Any, through: Any
) -> None:
    wire = admitted(vector, MONITOR)
    assert checked(through(wire), WITH_PROBE, MONITORED).steering == wire.steering
    with pytest.raises(SteeringError, match="admitted without this engine's monitor"):
        checked(through(admitted(vector)), WITH_PROBE, MONITORED)
    ends_before_it = admitted("calm", layers=[0]) if vector == "calm" else admitted(JOY.at([0]))
    assert checked(through(ends_before_it), WITH_PROBE, MONITORED)
    assert checked(through(admitted(vector, phase="prefill")), WITH_PROBE, MONITORED)
    other = replace(MONITORED, gates=GateLimits(monitor=OwnGate(b"other", SITES[1])))
    with pytest.raises(SteeringError, match="serves 0 per request"):
        checked(through(wire), WITH_PROBE, other)


def test_layers_of_a_registered_vector_count_as_content() -> None:
    narrowed, whole = admitted("calm", layers=[1]).steering, admitted("calm").steering
    assert (held_bytes(narrowed), held_bytes(whole)) == (WIDTH * 4, 0)
    assert held_bytes(admitted(JOY).steering) == 2 * WIDTH * 4
    recent = Decoded(kept_bytes=WIDTH * 4)
    first = checked(sent(admitted("calm", layers=[1])), SETTINGS, MODEL, recent)
    assert checked(sent(admitted("calm", layers=[1])), SETTINGS, MODEL, recent).steering is first.steering
    checked(sent(admitted("calm", layers=[0])), SETTINGS, MODEL, recent)
    assert checked(sent(admitted("calm", layers=[1])), SETTINGS, MODEL, recent).steering is not first.steering


def test_a_worker_reads_a_form_that_it_has_read_before_no_more() -> None:
    recent = Decoded()
    first, again = (
        steering_of(SimpleNamespace(extra_args={"steering": sent(admitted("calm"))}), SETTINGS, recent) for _ in "12"
    )
    assert first == admitted("calm").steering
    assert first is again


@pytest.mark.parametrize("wire", [admitted(JOY), Carried(admitted(JOY), admitted(JOY).steering)])
def test_trust_does_not_travel(wire: Carried) -> None:
    assert copy.deepcopy({"steering": wire})["steering"] is wire
    for there in (sent(wire), pickle.loads(pickle.dumps(wire))):
        assert type(there) is dict
        assert there == wire


def test_content_that_is_not_what_admission_saw_is_named_by_what_it_is() -> None:
    forged = sent(admitted(JOY))
    forged["vectors"][0]["data"] = CALM.block.tobytes()
    assert checked(forged, SETTINGS, MODEL, Decoded()).steering.prefill.row_key == CALM.digest


def test_a_sent_spec_of_names_is_read_once() -> None:
    recent = Decoded()
    first = checked(sent(admitted("calm", scale=2.0)), SETTINGS, MODEL, recent)
    assert checked(sent(admitted("calm", scale=2.0)), SETTINGS, MODEL, recent).steering is first.steering
    assert checked(sent(admitted("calm", scale=3.0)), SETTINGS, MODEL, recent).steering != first.steering


def test_content_is_not_kept() -> None:
    wide = SteeringVector.from_block(SITES, np.ones((2, 4096)))
    model = ModelSites(4096, 2, frozenset(SITES))
    recent, wire = Decoded(), sent(admitted_for(wide, model))
    first = checked(wire, SETTINGS, model, recent)
    assert checked(wire, SETTINGS, model, recent).steering is not first.steering


def admitted_for(vector: SteeringVector, model: ModelSites) -> Carried:
    resolved = Steering.parse({"interventions": [{"kind": "add", "vector": vector}]}).resolve({}, model)
    return Carried(encode(resolved, views=True), resolved)


def test_a_sender_who_changes_a_wire_form_afterwards_changes_it_for_no_one() -> None:
    recent, wire = Decoded(), sent(admitted("calm", scale=2.0))
    first = checked(wire, SETTINGS, MODEL, recent)
    wire["programs"][0][0][1] = 9.0
    wire["vectors"][0]["name"] = "grim"
    again = checked(sent(admitted("calm", scale=2.0)), SETTINGS, MODEL, recent)
    assert again.steering is first.steering
    assert dict(again) == dict(admitted("calm", scale=2.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", True),
        ("version", 2.0),
        ("programs", [[[0, True]]] * 2),
        ("programs", [[[False, 1.0]]] * 2),
        ("vectors", []),
    ],
)
def test_what_only_equals_a_known_wire_form_is_refused_as_ever(key: str, value: Any) -> None:
    recent = Decoded()
    checked(sent(admitted("calm")), SETTINGS, MODEL, recent)
    with pytest.raises(SteeringError, match=f"wire.{key}|wire.programs"):
        checked(sent(admitted("calm")) | {key: value}, SETTINGS, MODEL, recent)


def test_a_wire_form_of_an_unknown_vector_is_refused_each_time() -> None:
    recent, wire = Decoded(), sent(admitted("calm"))
    wire["vectors"][0]["digest"] = JOY.digest
    for _ in range(2):
        with pytest.raises(SteeringError, match="not registered in this process"):
            checked(wire, SETTINGS, MODEL, recent)
