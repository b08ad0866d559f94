"""Receipts: one type and one JSON form, made from resolved steering alone, whichever engine gives them."""

import json
from typing import Any

import numpy as np
import pytest

from trimtab.program import ResolvedSteering
from trimtab.program.codec import decode, encode
from trimtab.program.counting import GateUse
from trimtab.serving.receipt import Receipt, receipt_of, with_gates
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site
from trimtab.spec import Steering
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

SITES = [Site(layer, HookPoint.POST_BLOCK) for layer in range(3)]
MODEL = ModelSites(4, 3, frozenset(SITES), GateLimits(2, frozenset(SITES)))
CALM = SteeringVector.from_block(SITES, np.random.default_rng(1).normal(size=(3, 4)))
ANGER = Probe.at(SITES[0], [1.0, 2.0, 3.0, 4.0], bias=0.5)
NAMES = {"calm": CALM, "peace": CALM}


def resolved(*steps: dict[str, Any]) -> ResolvedSteering:
    spec = {"interventions": [{"kind": "add", **step} for step in steps]}
    return Steering.parse(spec).resolve(NAMES, MODEL, {"anger": ANGER})


def test_a_receipt_names_all_content_by_the_digest_that_the_caller_knows() -> None:
    gate = {"probe": "anger", "threshold": 1.0}
    steering = resolved(
        {"vector": "peace", "layers": [2], "gate": gate},
        {"vector": "calm"},
        {"vector": "calm", "scale": 2.0, "phase": "decode"},
        {"vector": CALM, "layers": [1], "gate": {"probe": ANGER, "threshold": 2.0}},
    )
    told = receipt_of(steering).as_json()
    whole = CALM.digest.hex()
    assert told["vectors"] == [{"name": name, "digest": whole} for name in ("peace", "calm", None)]
    direction = ANGER.vector.digest.hex()
    assert told["probes"] == [
        {"name": name, "digest": ANGER.digest.hex(), "direction": direction} for name in ("anger", None)
    ]


@pytest.mark.parametrize(
    "cancelled",
    [[{"vector": "calm", "scale": 0.0}], [{"vector": "calm"}, {"vector": "peace", "scale": -1.0}]],
    ids=["nothing", "opposites"],
)
def test_what_is_in_no_sum_is_in_no_receipt(cancelled: list[dict[str, Any]]) -> None:
    gated = {"vector": "calm", "scale": 0.0, "gate": {"probe": "anger", "threshold": 1.0}}
    told = receipt_of(resolved(*cancelled, gated)).as_json()
    assert (told["vectors"], told["probes"], told["sites"]) == ([], [], [])
    assert told["identity"] == {"prefill": "", "decode": ""}


def test_the_json_form_has_the_documented_keys_and_no_others() -> None:
    steering = resolved({"vector": "calm", "gate": {"probe": "anger", "threshold": 1.0}})
    always = {"identity", "sites", "vectors", "probes", "server_default", "steered_tokens", "interventions"}
    plain, use = receipt_of(steering, 5, 3), GateUse("anger", "ab", tokens=7, mean=0.5, above_half=3)
    told = plain.as_json()
    assert set(told) == set(receipt_of(None).as_json()) == always
    assert told["steered_tokens"] == {"prefill": 5, "decode": 2}
    assert told["sites"] == [f"post_block:{layer}" for layer in range(3)]
    assert set(receipt_of(steering, default_left=0.25).as_json()) == always | {"default_left"}
    (gate,) = with_gates(told, [use])["gates"]
    assert gate.items() >= {"probe": "anger", "gate": "ab", "tokens": 7, "mean": 0.5, "above_half": 3}.items()
    assert receipt_of(steering, gates=[use]).as_json()["gates"] == [gate]
    assert set(with_gates(told, None)) == always | {"gates", "gates_missing"}
    assert json.loads(json.dumps(told)) == told


def test_an_unsteered_output_has_the_receipt_of_nothing() -> None:
    receipt = receipt_of(None, 5, 3)
    assert receipt == Receipt({phase: "" for phase in Phase}, (), {phase: 0 for phase in Phase})


def test_names_are_no_part_of_what_is_done_and_do_not_travel() -> None:
    named, inline = resolved({"vector": "calm"}), resolved({"vector": CALM})
    assert named == inline
    assert named.vectors != inline.vectors
    assert decode(encode(named), {CALM.digest: CALM}).vectors == ()
