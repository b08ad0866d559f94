"""Receipts tell of interventions as they were written, whatever became of them in the programs."""

import json
from typing import Any

import numpy as np
import pytest

from kinds_cases import HERE, MODEL, H, resolve, unit, vector
from trimtab.program import ResolvedSteering
from trimtab.program.counting import SlotUse, summed
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.serving.interventions import slots_of, tokens_of, uses_of, with_corrections
from trimtab.serving.receipt import receipt_of
from trimtab.sites import Phase, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

V, W = vector(1), vector(2)
SAME = SteeringVector({HERE: -3.0 * V.directions[HERE]})
SITES = [HERE, Site(HERE.layer + 1, HERE.hook)]


def use(phase: Phase, slot: Any, measured: int, total: float, moved: int) -> SlotUse:
    return SlotUse(str(phase), slot.digest.hex(), str(slot.sites[0]), measured, total, moved)


def all_uses(steering: ResolvedSteering) -> list[SlotUse]:
    """Slot k of a program was measured on 10 tokens, with a mean of k + 1, and moved k of them."""
    return [
        use(phase, slot, 10, 10.0 * (k + 1), k)
        for phase in Phase
        for k, slot in enumerate(steering.program(phase).slots)
    ]


def test_each_phase_is_told_of_by_itself_and_added_up() -> None:
    steering = resolve(
        {"kind": "ablate", "vector": V, "phase": "decode"},
        {"kind": "clamp", "vector": W, "max": 1.0},
        {"kind": "add", "vector": W, "scale": 2.0, "phase": "prefill"},
    )
    assert tokens_of(steering, 7, 4) == [3, 10, 7]
    ablate, clamp, add = uses_of(steering, 7, 4, all_uses(steering))
    decode = [slot.read.parts[0].vector.digest for slot in steering.decode.slots]
    assert (ablate.corrections.measured, clamp.corrections.measured, add.corrections) == (10, 20, None)
    assert ablate.corrections.mean == 1 + decode.index(V.digest)
    assert clamp.corrections.mean == (1 + 1 + decode.index(W.digest)) / 2  # alone in the prompt
    assert clamp.corrections.touched == decode.index(W.digest) / 20


def test_what_is_joined_in_one_slot_is_told_of_under_each_that_asked_for_it() -> None:
    steering = resolve(
        {"kind": "ablate", "vector": V}, {"kind": "ablate", "vector": SAME}, {"kind": "scale", "vector": W, "factor": 3}
    )
    assert len(steering.decode.slots) == 2
    first, second, other = slots_of(steering)
    assert first == second
    assert len(first) == 2
    assert not first & other
    told = uses_of(steering, 5, 2, all_uses(steering))
    assert told[0].corrections == told[1].corrections != told[2].corrections


def test_an_intervention_of_several_slots_tells_of_all_of_them() -> None:
    steering = resolve({"kind": "rotate", "vector": V, "plane": W, "by": 30.0})
    (turn,) = uses_of(steering, 5, 2, all_uses(steering))
    assert turn.tokens == 6
    assert (turn.corrections.measured, turn.corrections.mean, turn.corrections.touched) == (40, 1.5, 2 / 40)


def test_equal_interventions_that_no_set_joins_are_each_told_of_by_their_own_numbers() -> None:
    swap = {"kind": "swap", "vector": V, "to": W, "phase": "decode"}
    steering = resolve(swap, swap)
    assert len(steering.decode.slots) == 2
    (digest,) = {slot.digest for slot in steering.decode.slots}
    told = uses_of(steering, 5, 2, [use(Phase.DECODE, steering.decode.slots[0], 10, 5.0, 4)])
    assert [one.corrections.measured for one in told] == [10, 10]
    assert slots_of(steering) == [{("decode", digest.hex())}] * 2


@pytest.mark.parametrize(
    "nothing",
    [
        [{"kind": "ablate", "vector": V, "strength": 0.0}],
        [{"kind": "add", "vector": V, "scale": 0.0}],
        [{"kind": "add", "vector": V, "scale": 1.5}, {"kind": "add", "vector": V, "scale": -1.5}],
    ],
)
def test_what_does_nothing_acts_on_no_token(nothing: list[dict[str, Any]]) -> None:
    steering = resolve(*nothing, {"kind": "add", "vector": W, "scale": 1.0})
    *none, other = receipt_of(steering, 5, 3).as_json()["interventions"]
    assert [(entry["tokens"], "measured" in entry) for entry in none] == [(0, False)] * len(nothing)
    assert other["tokens"] == 7


def test_vectors_that_are_summed_are_told_of_under_each_intervention() -> None:
    steering = resolve({"kind": "add", "vector": V, "scale": 1.0}, {"kind": "add", "vector": V, "scale": 2.0})
    assert tokens_of(steering, 5, 3) == [7, 7]


def test_a_monitor_splits_slots_and_both_parts_are_told_of() -> None:
    both = SteeringVector(dict.fromkeys(SITES, V.directions[HERE]))
    steering = resolve({"kind": "ablate", "vector": both}, {"kind": "add", "vector": both, "scale": 0.5})
    probe = SteeringVector({SITES[1]: unit(np.ones(H))})
    monitored = behind(steering, ResolvedGate.of(probe, 0.0, 1.0, label=MONITOR_LABEL))
    assert [len(program.slots) for program in monitored.programs] == [1, 2]
    ablate, add = slots_of(monitored)
    assert (len(ablate), len(add)) == (3, 0)
    assert monitored.asked_in == (frozenset({0, 1}),) * 2
    assert len(monitored.asked) == 2


def test_the_default_is_told_of_as_such_and_indexes_are_those_of_who_wrote_them() -> None:
    steps = [{"kind": "add", "vector": V, "scale": 1.0}, {"kind": "ablate", "vector": W, "phase": "decode"}]
    steering = Steering.parse({"interventions": steps}).resolve({}, MODEL, defaults=1)
    first, second = receipt_of(steering, 5, 3).as_json()["interventions"]
    assert (first["index"], first["server_default"]) == (0, True)
    assert (second["index"], "server_default" in second) == (0, False)


def test_numbers_that_are_not_finite_are_told_as_null() -> None:
    steering = resolve({"kind": "ablate", "vector": V, "phase": "decode"})
    wild = [use(Phase.DECODE, steering.decode.slots[0], 10, float("nan"), 3)]
    (entry,) = with_corrections(receipt_of(steering).as_json(), slots_of(steering), wild)["interventions"]
    assert (entry["measured"], entry["mean_correction"], entry["touched"]) == (10, None, 0.3)
    (unseen,) = with_corrections(receipt_of(steering).as_json(), slots_of(steering), [])["interventions"]
    assert (unseen["measured"], unseen["mean_correction"], unseen["touched"]) == (0, None, None)
    json.dumps([entry, unseen], allow_nan=False)


def test_reports_of_one_slot_and_place_are_added_and_others_kept_apart() -> None:
    one, other = (SlotUse("decode", "s", site, 3, 1.5, 2) for site in ("post_block:0", "post_block:2"))
    assert summed([other, one, one]) == [SlotUse("decode", "s", "post_block:0", 6, 3.0, 4), other]


def test_who_asked_is_no_part_of_what_is_done() -> None:
    once, twice = resolve({"kind": "ablate", "vector": V}), resolve(*[{"kind": "ablate", "vector": V}] * 2)
    assert once.decode.identity == twice.decode.identity
    assert once.decode.row_key == twice.decode.row_key
    assert once == twice
