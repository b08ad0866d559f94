"""Every program of a request with spans is counted, told, sent, monitored and lowered as one of a phase is."""

import random
from typing import Any

import pytest

import where_model
from trimtab.program import EMPTY, ResolvedSteering
from trimtab.program.codec import decode, encode
from trimtab.program.lowering import contents_of, lowered, placed
from trimtab.program.monitor import behind, monitor_of, reaches
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.serving.interventions import slots_of, tokens_of
from trimtab.serving.receipt import receipt_of
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.unplaced import Unplaced
from trimtab.vectors import Probe

SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(4))
MODEL = ModelSites(2, 4, SITES, GateLimits(2, SITES), slots=SlotLimits(4, SITES, frozenset({"ablate"})))
PROBE = Probe.at(Site(2, HookPoint.POST_BLOCK), [1.0, 0.0])
MONITOR = ResolvedGate.of(PROBE.vector, 0.5, 2.0, label=MONITOR_LABEL)


def rows(*values: float) -> dict[str, Any]:
    return {"post_block": {str(layer): [value, 1.0] for layer, value in enumerate(values)}}


GATE = {"probe": PROBE, "threshold": 0.0, "sharpness": 1.0}
STEPS: list[dict[str, Any]] = [
    {"kind": "add", "vector": rows(1.0, 2.0, 3.0, 4.0)},
    {"kind": "add", "vector": rows(0.5), "scale": 2.0},
    {"kind": "ablate", "vector": rows(0.0, 1.0, 1.0)},
    {
        "kind": "add",
        "vector": {"post_block": {"2": [0.0, 1.0]}},
        "gate": {"probe": PROBE, "threshold": 0.0, "sharpness": 1.0},
    },
]
WHERES: list[dict[str, Any]] = [
    {"prompt": "all"}, {"prompt": [[1, 3], [-2, None]]}, {"answer": [[0, 4], [6, 7]]}, {"after": [7, 8], "until": [9]},
    {"prompt": "all", "answer": [[2, None]], "not": {"tokens": [8]}}, {"answer": "all", "tokens": [7, 9]},
    {"section": {"name": "thinking", "start": [7], "end": [9, 9]}}, {"until": [8]},
]  # fmt: skip


def asked(generator: random.Random) -> tuple[list[dict[str, Any]], list[int], list[int], ResolvedSteering]:
    """Interventions, a prompt and its answer, and what they come to."""
    prompt = [generator.choice((3, 7, 8, 9)) for _ in range(generator.randrange(4, 9))]
    answer = [generator.choice((3, 7, 8, 9)) for _ in range(generator.randrange(1, 14))]
    steps = [step | {"where": generator.choice(WHERES)} for step in generator.sample(STEPS, generator.randrange(1, 4))]
    found = Steering.parse({"interventions": steps}).resolve({}, MODEL)
    assert isinstance(found, Unplaced)
    return steps, prompt, answer, found.placed(PromptTokens(len(prompt), prompt))


@pytest.fixture(scope="module")
def cases() -> list[tuple[list[dict[str, Any]], list[int], list[int], ResolvedSteering]]:
    generator = random.Random(0)
    return [asked(generator) for _ in range(200)]


def test_receipts_count_the_tokens_that_each_intervention_acted_on(cases: Any) -> None:
    for steps, prompt, answer, steering in cases:
        tokens = [*prompt, *answer]
        acting = where_model.acting(steps, where_model.Conversation(prompt, answer))[: len(tokens) - 1]
        expected = [sum(index in some for some in acting) for index in range(len(steps))]
        assert tokens_of(steering, len(prompt), len(answer), tokens) == expected
        told = receipt_of(steering, len(prompt), len(answer), tokens=tokens).as_json()
        assert [use["tokens"] for use in told["interventions"]] == expected
        some = [bool(one) for one in acting]
        counts = {"prefill": sum(some[: len(prompt)]), "decode": sum(some[len(prompt) :])}
        assert told["steered_tokens"] == counts
        assert {phase for phase in told["identity"] if told["identity"][phase]} >= {p for p in counts if counts[p]}


def test_receipts_tell_where_in_tokens(cases: Any) -> None:
    told_all = 0
    for steps, prompt, answer, steering in cases:
        tokens = [*prompt, *answer]
        acting = where_model.acting(steps, where_model.Conversation(prompt, answer))
        told = receipt_of(steering, len(prompt), len(answer), tokens=tokens).as_json()["interventions"]
        for index, use in enumerate(told):
            where = use["where"]
            inside = {at for first, stop in where["prompt"] for at in range(first, stop)}
            inside |= {
                len(prompt) + at for first, stop in where["answer"] for at in range(first, min(stop or 99, len(answer)))
            }
            selected = {at for at, some in enumerate(acting) if index in some}
            if "by_tokens" not in where:
                told_all += 1
                assert inside == selected
            assert selected <= inside
    assert told_all > len(cases) / 2


def test_a_request_by_phase_tells_no_ranges() -> None:
    steering = Steering.parse({"interventions": STEPS[:1]}).resolve({}, MODEL)
    assert "where" not in receipt_of(steering, 3, 3).as_json()["interventions"][0]


def test_spans_travel_and_what_is_shared_by_their_names_does_not_change(cases: Any) -> None:
    for *_, steering in cases:
        back = decode(encode(steering), {})
        assert back == steering
        assert back.runs == steering.runs
        assert [back.identity(phase) for phase in Phase] == [steering.identity(phase) for phase in Phase]
        assert contents_of(back, lowers=True) == contents_of(steering, lowers=True)


def test_a_monitor_stands_before_every_program_of_the_answer_and_none_of_the_prompt(cases: Any) -> None:
    reached = 0
    for *_, steering in cases:
        monitored = behind(steering, MONITOR)
        assert monitored.spans == steering.spans
        for phase, before, after in zip(steering.phases, steering.programs, monitored.programs, strict=True):
            alone = ResolvedSteering((before, before))
            assert after == (before if phase is Phase.PREFILL else behind(alone, MONITOR).decode)
        assert reaches(steering, MONITOR.site) == (monitored.runs != steering.runs)
        assert bool(monitor_of(monitored)) == reaches(steering, MONITOR.site)
        assert not reaches(monitored, MONITOR.site)
        reached += reaches(steering, MONITOR.site)
    assert 0 < reached < len(cases)


def test_gates_of_every_program_of_the_answer_are_lowered(cases: Any) -> None:
    found = 0
    for *_, steering in cases:
        each = placed(steering, lowers=True)
        assert len(each) == len(steering.programs)
        for phase, program, one in zip(steering.phases, steering.programs, each, strict=True):
            kept = ResolvedSteering((program, program))
            assert one == (lowered(program) if phase is Phase.DECODE else placed(kept, lowers=False)[0])
            found += bool(one.probes)
            alone = ResolvedSteering((program, EMPTY) if phase is Phase.PREFILL else (EMPTY, program))
            assert contents_of(steering, lowers=True).rows >= contents_of(alone, lowers=True).rows
    assert found > 5


def test_slots_are_told_of_under_each_intervention_that_has_them_in_any_program(cases: Any) -> None:
    for steps, *_, steering in cases:
        ablating = [step["kind"] == "ablate" for step in steps]
        assert [bool(slots) for slots in slots_of(steering)] == ablating
