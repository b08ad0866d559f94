"""Admission without vLLM: what the one validator makes of a request, and what it refuses."""

import base64
import copy
import gc
import json
import weakref
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from trimtab.engines.vllm.carried import Carried
from trimtab.engines.vllm.frontend.admission import FrontEnd, refusal_reason
from trimtab.errors import SteeringError
from trimtab.program.codec import decode
from trimtab.serving.registry import VectorRegistry
from trimtab.serving.server_default import merge
from trimtab.sites import HookPoint, ModelSites, Room, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector
from work import calls, peak_bytes

WIDTH, LAYERS = 8, 4
SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS))
MODEL = ModelSites(WIDTH, LAYERS, SITES)


def vector(seed: int, width: int = WIDTH, layers: int = LAYERS) -> SteeringVector:
    numbers = np.random.default_rng(seed).normal(size=(layers, width))
    return SteeringVector({Site(layer, HookPoint.POST_BLOCK): numbers[layer] for layer in range(layers)})


CALM, JOY = vector(1), vector(2)


class Counts:
    def __init__(self) -> None:
        self.accepted = 0
        self.reasons: list[str] = []

    def steered(self) -> None:
        self.accepted += 1

    def refused(self, reason: str) -> None:
        self.reasons.append(reason)


def add(name: Any, **more: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": name, **more}]}


def packed(rows: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(rows.astype("<f2").tobytes()).decode()
    layers = list(range(len(rows)))
    return {"post_block": {"dtype": "float16", "shape": list(rows.shape), "layer_indices": layers, "data": data}}


def front_end(default: Any = None) -> FrontEnd:
    return FrontEnd(MODEL, VectorRegistry({"calm": CALM}), default, Counts())


def program_rows(wire: Any, known: dict[bytes, SteeringVector] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What a worker that holds `known` adds at every site in either phase, for a wire form that went over msgpack."""
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(wire))
    resolved = decode(travelled, {CALM.digest: CALM} if known is None else known)
    sites = sorted(SITES)
    phases = (resolved.prefill, resolved.decode)
    rows = [p.row(sites) * p.coefficient if p.terms else np.zeros((LAYERS, WIDTH)) for p in phases]
    return rows[0], rows[1]


def test_an_unsteered_request_passes_untouched():
    assert front_end().admit(None) is None


@pytest.mark.parametrize("form", [dict, json.dumps, Steering.parse], ids=["mapping", "json", "Steering"])
def test_every_form_of_a_spec_is_admitted_to_the_same_program(form):
    admission = front_end().admit(form(add("calm", scale=2.0, phase="decode")))
    prefill, decode = program_rows(admission)
    np.testing.assert_array_equal(prefill, np.zeros((LAYERS, WIDTH)))
    np.testing.assert_array_equal(decode, 2 * CALM.block)


def test_a_start_vector_travels_by_digest_and_a_registered_one_as_its_content():
    front = front_end()
    front.registry.add("joy", JOY)
    by_name = front.admit(add("calm"))
    assert len(msgspec.msgpack.encode(by_name)) < 200
    rows, _ = program_rows(front.admit(add("joy")), known={})
    np.testing.assert_array_equal(rows, JOY.block)


def test_a_name_registered_anew_leaves_an_admitted_request_as_it_was():
    front = front_end()
    front.registry.add("mood", CALM)
    admitted = front.admit(add("mood"))
    front.registry.add("mood", JOY)
    np.testing.assert_array_equal(program_rows(admitted)[0], CALM.block)
    np.testing.assert_array_equal(program_rows(front.admit(add("mood")))[0], JOY.block)
    front.registry.remove("mood")
    with pytest.raises(SteeringError, match="mood"):
        front.admit(add("mood"))


def test_the_default_is_added_to_requests_with_and_without_a_spec_of_their_own():
    front = front_end(add("calm", scale=0.5))
    np.testing.assert_allclose(program_rows(front.admit(None))[0], 0.5 * CALM.block)
    both = front.admit(add(JOY, scale=2.0))
    np.testing.assert_allclose(program_rows(both)[0], 0.5 * CALM.block + 2 * JOY.block, rtol=1e-6)
    assert both.receipt["server_default"] is True


def test_no_change_at_run_time_reaches_what_the_default_names():
    front = front_end(add("calm"))
    for change in (lambda: front.registry.add("calm", JOY), lambda: front.registry.remove("calm")):
        with pytest.raises(SteeringError, match="belongs to the start"):
            change()
        np.testing.assert_array_equal(program_rows(front.admit(None))[0], CALM.block)


def test_a_default_that_cannot_be_honoured_stops_the_start():
    with pytest.raises(SteeringError, match=r"default.*nobody"):
        front_end(add("nobody"))


def test_a_request_is_blamed_for_its_own_part_by_its_own_path():
    front = front_end(add("calm"))
    with pytest.raises(SteeringError) as caught:
        front.admit(add("nobody"))
    assert caught.value.field == "steering.interventions[0].vector"


def test_a_sum_that_only_overflows_with_the_default_says_so():
    huge = SteeringVector({Site(0, HookPoint.POST_BLOCK): [6e4] * WIDTH})
    front = front_end(add(huge))
    front_end().admit(add(huge))
    with pytest.raises(SteeringError, match="server's default"):
        front.admit(add(SteeringVector({Site(0, HookPoint.POST_BLOCK): [6.1e4] * WIDTH})))


def test_merging_puts_the_default_first_and_keeps_all():
    merged = merge(Steering.parse(add("a")), Steering.parse(add("b")))
    assert [step.vector for step in merged.interventions] == ["a", "b"]


BAD = {
    "not an object": (3, "steering", "other"),
    "not json": ("{", "steering", "other"),
    "empty": ({}, "steering.interventions", "interventions"),
    "no interventions": ({"interventions": []}, "steering.interventions", "interventions"),
    "unknown key": ({"interventions": [], "sum": 1}, "steering.sum", "other"),
    "unknown name": (add("nobody"), "steering.interventions[0].vector", "vector"),
    "unknown kind": ({"interventions": [{"kind": "x", "vector": "calm"}]}, "steering.interventions[0].kind", "kind"),
    "unknown hook": (add({"resid": {"0": [1.0] * WIDTH}}), "steering.interventions[0].vector.resid", "vector"),
    "unserved hook": (add({"pre_attn": {"0": [1.0] * WIDTH}}), "steering.interventions[0].vector.pre_attn", "pre_attn"),
    "unknown layer": (add({"post_block": {"9": [1.0] * WIDTH}}), "steering.interventions[0].vector", "post_block"),
    "narrowed away": (add("calm", layers=[7]), "steering.interventions[0].layers", "layers"),
    "wrong width": (add(packed(np.ones((1, 5)))), "steering.interventions[0].vector", "vector"),
    "not finite": (
        add(packed(np.full((1, WIDTH), np.nan))),
        "steering.interventions[0].vector.post_block.data",
        "data",
    ),
    "infinite scale": (add("calm", scale=float("inf")), "steering.interventions[0].scale", "scale"),
    "text scale": (add("calm", scale="2"), "steering.interventions[0].scale", "scale"),
    "huge scale": (add("calm", scale=1e30), "steering.interventions[0].scale", "scale"),
    "unknown phase": (add("calm", phase="later"), "steering.interventions[0].phase", "phase"),
    "gate": (add("calm", gate={"probe": "p", "threshold": 1.0}), "steering.interventions[0].gate", "gate"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_spec_is_refused_at_its_field_and_counted(case: str):
    given, field, reason = BAD[case]
    front = front_end()
    with pytest.raises(SteeringError) as caught:
        front.admit(given)
    assert caught.value.field.startswith(field)
    assert front._observer.reasons == [reason]
    assert front._observer.accepted == 0


@pytest.mark.parametrize("field", [
    "plane", "by", "to", "read", "write", "bias", "amount", "unit", "adaptive", "factor", "strength", "min", "max",
    "value", "hooks", "layers", "invert", "hard",
])  # fmt: skip
def test_a_refusal_is_counted_under_each_field_of_a_kind(field: str):
    assert refusal_reason(f"steering.interventions[1].{field}") == field
    assert refusal_reason(f"steering.interventions[1].{field}[0].calm") == field


def test_a_refused_norm_is_counted_under_its_field():
    assert refusal_reason("keep_norm") == "keep_norm"


def test_counter_labels_are_never_what_a_caller_wrote():
    assert refusal_reason("interventions[3].vector.evil{}.data") == "data"
    assert refusal_reason("evil") == "other"


def test_receipts_name_content_and_identity_per_phase():
    front = front_end()
    receipt = front.admit(add("calm", phase="decode", layers=[1])).receipt
    assert receipt["identity"]["prefill"] == ""
    assert len(receipt["identity"]["decode"]) == 64
    assert receipt["sites"] == ["post_block:1"]
    assert receipt["vectors"] == [{"name": "calm", "digest": CALM.digest.hex()}]
    assert receipt["server_default"] is False
    assert json.loads(json.dumps(receipt)) == receipt
    other = front.admit(add("calm", phase="decode", layers=[2])).receipt
    assert other["identity"]["decode"] != receipt["identity"]["decode"]


def test_cloning_sampling_parameters_does_not_copy_vectors():
    wire = front_end().admit(add(JOY))
    assert copy.deepcopy({"steering": wire})["steering"] is wire
    assert type(wire) is Carried


def test_a_spec_seen_before_costs_less_and_still_follows_its_names():
    front = front_end()
    front.registry.add("mood", CALM)
    first = front.admit(add("mood"))
    assert front.admit(add("mood")) is first
    assert front.admit(add("mood", scale=2)) is not first
    front.registry.add("mood", JOY)
    np.testing.assert_array_equal(program_rows(front.admit(add("mood")))[0], JOY.block)
    front.registry.add("mood", CALM)
    assert len(msgspec.msgpack.encode(front.admit(add("mood")))) < 200  # the content that workers hold, again


def test_a_caller_who_changes_a_spec_after_its_admission_changes_nothing():
    front, given = front_end(), add("calm", layers=[0, 1])
    before = front.admit(given)
    identity = dict(before.receipt["identity"])
    given["interventions"][0] |= {"scale": 7.0}
    given["interventions"][0]["layers"].append(2)
    assert front.admit(given).receipt["identity"] != identity
    assert front.admit(add("calm", layers=[0, 1])) is before
    assert before.receipt["identity"] == identity


def test_what_only_equals_an_admitted_spec_is_refused_as_ever():
    front = front_end()
    front.admit(add("calm", scale=1, layers=[1]))
    for wrong in (add("calm", scale=True, layers=[1]), add("calm", scale=1, layers=[1.0]), add(b"calm", scale=1)):
        with pytest.raises(SteeringError):
            front.admit(wrong)


def test_a_spec_that_was_refused_is_refused_again_and_counted_again():
    front = front_end()
    for _ in range(2):
        with pytest.raises(SteeringError):
            front.admit(add("grim"))
    assert front._observer.reasons == ["vector", "vector"]


@pytest.mark.parametrize("make", [lambda: add(JOY), lambda: Steering.parse(add(JOY)), lambda: add("joy")])
def test_content_is_not_kept_once_its_request_is_gone(make):
    front = front_end()
    front.registry.add("joy", JOY)
    gone = weakref.ref(front.admit(make()))
    gc.collect()
    assert gone() is None


def test_admission_is_cheap_at_the_size_of_a_large_model():
    layers, width = 32, 4096
    model = ModelSites(width, layers, frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(layers)))
    front = FrontEnd(model, VectorRegistry({"calm": vector(1, width, layers)}))
    front.admit(add("calm"))
    rows = np.random.default_rng(0).normal(size=(4, layers, width))
    inline = iter([add(packed(block)) for block in rows])
    front.admit(next(inline))  # what the first call imports is not counted
    assert calls(lambda: front.admit(add("calm", scale=1.25))) < 460
    assert calls(lambda: front.admit(add("calm", scale=1.25))) < 100  # seen before
    given = [next(inline), next(inline)]
    assert calls(lambda: front.admit(given[0])) < 1500
    float16 = 2 * layers * width
    assert peak_bytes(lambda: front.admit(given[1])) < 1.5 * float16  # decoded once, and never copied


def test_a_request_for_more_rows_than_there_are_is_refused_with_both_numbers_and_the_remedy():
    model = replace(MODEL, room=Room(1, 0))
    counts = Counts()
    front = FrontEnd(model, VectorRegistry({"calm": CALM}), None, counts)
    assert front.admit(add("calm")) is not None  # both phases share a row
    twice = {"interventions": [{**add("calm")["interventions"][0], "phase": "prefill"}]}
    twice["interventions"] += [{"kind": "add", "vector": packed(np.ones((LAYERS, WIDTH))), "phase": "decode"}]
    with pytest.raises(SteeringError, match=r"needs 2 table rows .* has 1: .*table_memory") as e:
        front.admit(twice)
    assert e.value.field == "steering"
    assert counts.reasons == ["other"]
    with pytest.raises(SteeringError, match="the server's default spec: needs 2 table rows"):
        FrontEnd(model, VectorRegistry({"calm": CALM}), twice)
