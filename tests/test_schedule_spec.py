"""`schedule` in a request: what may be said, and which strength each token then receives of each intervention."""

import random
from typing import Any

import numpy as np
import pytest

import where_model
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.program.joint_gate import schedule_of
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.unplaced import Unplaced
from trimtab.vectors import Probe

SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(4))
SLOTS = SlotLimits(4, SITES, frozenset({"ablate"}))
MODEL = ModelSites(2, 4, SITES, GateLimits(4, SITES), slots=SLOTS)
PLAIN = ModelSites(2, 4, SITES)
GATE = {"probe": Probe.at(Site(1, HookPoint.POST_BLOCK), [1.0, 0.0]), "threshold": 0.0}


def add(value: float, layer: int = 2, **more: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": {"post_block": {str(layer): [value, 1.0]}}, **more}


def placed(*steps: dict[str, Any], prompt: int = 3, model: ModelSites = MODEL) -> ResolvedSteering:
    found = Steering.parse({"interventions": list(steps)}).resolve({}, model)
    assert isinstance(found, Unplaced)
    return found.placed(PromptTokens(prompt, [3] * prompt))


@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        ({}, "schedule"),
        ({"decay": 0.9, "ramp": [0, 8]}, "schedule"),
        ({"decay": 0.0}, "schedule.decay"),
        ({"decay": 1.01}, "schedule.decay"),
        ({"decay": -0.5}, "schedule.decay"),
        ({"decay": "0.9"}, "schedule.decay"),
        ({"decay": True}, "schedule.decay"),
        ({"decay": float("nan")}, "schedule.decay"),
        ({"ramp": [8, 0]}, "schedule.ramp"),
        ({"ramp": [4, 4]}, "schedule.ramp"),
        ({"ramp": [-1, 4]}, "schedule.ramp"),
        ({"ramp": [0, 1 << 30]}, "schedule.ramp"),
        ({"ramp": [0, 8.0]}, "schedule.ramp"),
        ({"ramp": [0]}, "schedule.ramp"),
        ({"ramp": 8}, "schedule.ramp"),
        ({"fade": 1}, "schedule.fade"),
        ([0, 8], "schedule"),
        (0.98, "schedule"),
    ],
)
def test_what_is_no_schedule_is_refused_where_the_fault_stands(schedule: Any, field: str) -> None:
    with pytest.raises(SteeringError) as refusal:
        Steering.parse({"interventions": [add(1.0, schedule=schedule)]})
    assert refusal.value.field == f"interventions[0].{field}"


@pytest.mark.parametrize("place", [{"phase": "prefill"}, {"where": {"prompt": "all"}}, {"where": {"prompt": [[0, 2]]}}])
def test_a_schedule_of_a_prompt_alone_is_refused(place: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=r"interventions\[0\]\.schedule: is one of tokens of the answer"):
        Steering.parse({"interventions": [add(1.0, schedule={"decay": 0.9}, **place)]})


@pytest.mark.parametrize("schedule", [{"decay": 0.98}, {"ramp": [0, 8]}])
def test_a_schedule_is_dumped_as_it_was_written(schedule: dict[str, Any]) -> None:
    steering = Steering.parse({"interventions": [add(1.0, schedule=schedule)]})
    dumped = steering.model_dump(mode="json")["interventions"][0]
    assert dumped["schedule"] == schedule
    assert Steering.parse(steering.model_dump(mode="json")) == steering
    assert "schedule" not in Steering.parse({"interventions": [add(1.0)]}).model_dump()["interventions"][0]


def test_a_schedule_that_changes_nothing_is_none() -> None:
    for schedule in ({"decay": 1.0}, {"ramp": [0, 1]}):
        assert placed(add(1.0, schedule=schedule)) == placed(add(1.0, where={"prompt": "all", "answer": "all"}))


def test_a_row_has_its_schedule_without_a_gate_and_more_needs_one() -> None:
    fading = add(1.0, schedule={"decay": 0.9})
    placed(fading, model=PLAIN)
    with pytest.raises(SteeringError, match=r"interventions: has 1 different gates .* so does a `schedule`"):
        placed(fading, add(2.0), model=PLAIN)
    placed(fading, add(2.0))


def test_all_schedules_alone_are_read_at_one_site_and_others_with_their_gate() -> None:
    found = placed(add(1.0, 2, schedule={"decay": 0.9}), add(1.0, 3, schedule={"decay": 0.9}), add(1.0, 0))
    (gate,) = found.gates
    assert gate.site == Site(0, HookPoint.POST_BLOCK)
    found = placed(add(1.0, 3, schedule={"decay": 0.9}, gate=GATE))
    assert {gate.site for gate in found.gates if schedule_of(gate)} == {Site(1, HookPoint.POST_BLOCK)}
    behind = ModelSites(2, 4, SITES, GateLimits(4, SITES, stages=(2,)))
    found = placed(add(1.0, 3, schedule={"decay": 0.9}), add(1.0, 3), model=behind)
    assert found.gates[0].site == Site(2, HookPoint.POST_BLOCK), "a factor stays within its pipeline stage"


def test_the_identity_of_a_spec_knows_its_schedules() -> None:
    specs = [add(1.0, where={"answer": "all"}, **more) for more in ({}, {"schedule": {"decay": 0.9}},
             {"schedule": {"decay": 0.8}}, {"schedule": {"ramp": [0, 9]}})]  # fmt: skip
    found = [Steering.parse({"interventions": [spec]}).resolve({}, MODEL) for spec in specs]
    assert len({one.identity_of_spec for one in found if isinstance(one, Unplaced)}) == 4
    with pytest.raises(SteeringError, match=r"interventions\[0\]\.schedule: is known with a prompt alone"):
        Steering.parse({"interventions": [add(1.0, schedule={"decay": 0.9})]}).identity("decode")


SCHEDULES: list[dict[str, Any]] = [{"decay": 0.5}, {"decay": 0.9}, {"ramp": [0, 4]}, {"ramp": [2, 7]}, {}]
WHERES: list[dict[str, Any]] = [
    {}, {"where": {"prompt": "all", "answer": [[3, None]]}}, {"where": {"answer": "all"}},
    {"where": {"answer": [[1, 6]]}},
    {"where": {"after": [7]}}, {"where": {"answer": "all", "tokens": [8]}}, {"phase": "decode"},
]  # fmt: skip


def strength(schedule: dict[str, Any], token: int) -> float:
    if "decay" in schedule:
        return float(schedule["decay"]) ** token
    first, end = schedule.get("ramp", (-(10**9), 0))
    return min(max((token - first + 1) / (end - first), 0.0), 1.0)


def test_each_token_receives_each_intervention_at_the_strength_of_its_place() -> None:
    generator = random.Random(0)
    for _ in range(300):
        prompt, answer = ([generator.choice((3, 7, 8)) for _ in range(count)] for count in (4, 10))
        chosen = [(generator.choice(SCHEDULES), generator.choice(WHERES)) for _ in range(generator.randrange(1, 4))]
        steps = [
            add(float(2**k), generator.choice((1, 2)), **place, **({"schedule": one} if one else {}))
            for k, (one, place) in enumerate(chosen)
        ]
        found = Steering.parse({"interventions": steps}).resolve({}, MODEL)
        if not isinstance(found, Unplaced):
            continue
        steering = found.placed(PromptTokens(len(prompt), prompt))
        acting = where_model.acting(steps, where_model.Conversation(prompt, answer))
        assert steering.spans is not None
        for position, place in enumerate(steering.spans.decided([*prompt, *answer])):
            token = position - len(prompt)
            received = np.zeros((4, 2))
            for term in steering.programs[place].all_terms:
                schedule = schedule_of(term.gate)
                factor = 1.0 if schedule is None else schedule.factor(token)
                for site, direction in term.vector.directions.items():
                    received[site.layer] += factor * term.scale * direction
            wanted = np.zeros((4, 2))
            for index in acting[position]:
                ((layer, row),) = steps[index]["vector"]["post_block"].items()
                wanted[int(layer)] += (strength(chosen[index][0], token) if token >= 0 else 1.0) * np.array(row)
            assert received == pytest.approx(wanted, rel=1e-5, abs=1e-12)
            assert steering.phases[place] is (Phase.PREFILL if token < 0 else Phase.DECODE)
