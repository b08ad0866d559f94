"""What `where` cannot be is refused where it stands, with what would be right."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import where_tokenizers
from test_where_model import SITES, VECTORS, acting, unplaced
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site, SlotLimits
from trimtab.spec import Steering
from trimtab.spec.prompt_tokens import PromptTokens, Tags
from trimtab.spec.unplaced import Unplaced
from trimtab.vectors import Probe, SteeringVector

PROMPT = PromptTokens(6, [1, 2, 3, 1, 2, 3], tags=Tags(((7,),), ((8,),)), vocabulary_size=100)

FORMS: list[tuple[Any, str, str]] = [
    (5, "", "got 5, want an object"),
    ([], "", "got [], want an object"),
    ("answer", "", "got 'answer', want an object"),
    ({"promt": "all"}, ".promt", "unknown key (did you mean 'prompt'?); the keys are after, answer, not, prompt"),
    ({"excluded": {}}, ".excluded", "unknown key"),
    ({1: "all"}, "", "has the key 1"),
    ({"prompt": "alll"}, ".prompt", "got 'alll', want \"all\", a list of ranges"),
    ({"prompt": []}, ".prompt", "is empty, so it selects nothing"),
    ({"prompt": [0, 4]}, ".prompt", "got [0, 4], want a list of ranges, [[from, to], ...]"),
    ({"prompt": True}, ".prompt", "got True, want"),
    ({"prompt": [[4, 0]]}, ".prompt[0]", "got [4, 0], which ends before the first token: null is an open end"),
    ({"prompt": [[-3, 0]]}, ".prompt[0]", "got [-3, 0], which ends before the first token: null is an open end"),
    ({"prompt": [[0, 1], [4, 2]]}, ".prompt[1]", "got [4, 2], which runs backwards"),
    ({"prompt": [[-2, -4]]}, ".prompt[0]", "got [-2, -4], which runs backwards"),
    ({"prompt": [[4, 4]]}, ".prompt[0]", "got [4, 4], which is empty"),
    ({"prompt": [[0, 1, 2]]}, ".prompt[0]", "want two numbers, [from, to]"),
    ({"prompt": [[0, True]]}, ".prompt[0][1]", "got True, want a whole number or null"),
    ({"prompt": [[1.0, 4]]}, ".prompt[0][0]", "got 1.0, want a whole number or null"),
    ({"prompt": [[float("nan"), 4]]}, ".prompt[0][0]", "got nan, want a whole number or null"),
    ({"prompt": [["1", 4]]}, ".prompt[0][0]", "got '1', want a whole number or null"),
    ({"prompt": [[0, 10**30]]}, ".prompt[0][1]", "want a whole number or null, from -16777216 to 16777216"),
    ({"prompt": [[0, 10**5000]]}, ".prompt[0][1]", "got a huge int"),
    ({"prompt": [[i, i + 1] for i in range(4097)]}, ".prompt", "has 4097 items, at most 4096 are allowed"),
    ({"prompt": {"txt": "a"}}, ".prompt", '(did you mean \'text\'?), want {"text": ...} or {"role": ...}'),
    ({"prompt": {}}, ".prompt", 'want {"text": ...} or {"role": ...}'),
    ({"prompt": {"text": ""}}, ".prompt.text", "has 0 characters"),
    ({"prompt": {"text": 5}}, ".prompt.text", "got 5, want a text"),
    ({"prompt": {"text": "\ud800"}}, ".prompt.text", "half of a surrogate pair"),
    ({"prompt": {"text": "a", "turns": "all"}}, ".prompt.turns", "unknown key"),
    ({"prompt": {"text": "a", "occurrence": True}}, ".prompt.occurrence", "got True, want a whole number"),
    ({"prompt": {"text": "a", "occurrence": 1.0}}, ".prompt.occurrence", "got 1.0, want a whole number"),
    ({"prompt": [{"text": "a", "occurrence": 10**9}]}, ".prompt[0].occurrence", "from -4096 to 4096"),
    (
        {"prompt": {"text": "a", "role": "user"}},
        ".prompt",
        "a place is one or the other: give each by itself, in a list",
    ),
    ({"prompt": [{"role": "user", "text": "a"}]}, ".prompt[0]", "has `text` and `role`"),
    ({"prompt": {"role": "user", "turns": "first"}}, ".prompt.turns", "got 'first', want 'all' or 'last'"),
    ({"prompt": {"role": None}}, ".prompt.role", "got None, want a text"),
    ({"answer": {"text": "a"}}, ".answer", 'want "all" or a list of ranges'),
    ({"answer": [{"text": "a"}]}, ".answer[0]", "texts and roles are places of a prompt"),
    ({"answer": [[-3, None]]}, ".answer[0][0]", "got -3: nobody knows where an answer will end"),
    ({"answer": [[0, 1 << 25]]}, ".answer[0][1]", "got 33554432, want a whole number or null, from 0 to 16777216"),
    ({"answer": [[None, -1]]}, ".answer[0][1]", "got -1: nobody knows where an answer will end"),
    ({"answer": []}, ".answer", "is empty, so it selects nothing"),
    ({"prompt": [], "answer": []}, ".prompt", "is empty, so it selects nothing"),
    ({"prompt": [], "answer": None}, ".prompt", "is empty, so it selects nothing"),
    ({"answer": [], "section": "thinking"}, ".answer", "is empty, so it selects nothing"),
    ({"prompt": "all", "not": {"answer": []}}, ".not.answer", "is empty, so it selects nothing"),
    ({"prompt": "all", "section": "thinking"}, ".section", "give two interventions, one with `prompt` and one with"),
    ({"prompt": "all", "answer": "all", "after": "x"}, ".after", "cannot stand beside `prompt`"),
    ({"prompt": "all", "until": [1]}, ".until", "cannot stand beside `prompt`"),
    ({"section": "think"}, ".section", "(did you mean 'thinking'?)"),
    ({"section": {"name": "both"}}, ".section.name", "want 'thinking' or 'response'"),
    ({"section": {"name": "thinking", "start": "a"}}, ".section.end", "is required: a section has two tags"),
    ({"section": {"name": "thinking", "start": "a", "end": "a"}}, ".section.end", "got 'a', as for `start`"),
    ({"after": ""}, ".after", "has 0 characters"),
    ({"after": []}, ".after", "is empty, so it selects nothing"),
    ({"after": ["."]}, ".after", "got ['.']: a list is one of token ids, and a text stands without it"),
    ({"until": [5, "."]}, ".until", "got [5, '.']: a list is one of token ids"),
    ({"section": {"name": "thinking", "start": ["a"], "end": "b"}}, ".section.start", "a text stands without it"),
    ({"after": 5}, ".after", "got 5, want a text or a list of token ids"),
    ({"after": [1] * 17}, ".after", "has 17 items, at most 16 are allowed"),
    ({"until": [1, -1]}, ".until[1]", "got -1, want a token's id, a whole number, from 0"),
    ({"until": [True]}, ".until[0]", "got True, want a token's id"),
    ({"tokens": 5}, ".tokens", "want a list of token ids, or of texts of one token each"),
    ({"tokens": []}, ".tokens", "is empty, so it selects nothing"),
    ({"tokens": [1, 1.5]}, ".tokens[1]", "got 1.5, want a token's id"),
    ({"tokens": [2**31]}, ".tokens[0]", "from 0 to 2147483647"),
    ({"special_tokens": 1}, ".special_tokens", "got 1, want true or false"),
    ({"special_tokens": "no"}, ".special_tokens", "got 'no', want true or false"),
    ({"not": []}, ".not", "want an object of the keys that stand beside `not`"),
    ({"not": {"not": {}}}, ".not.not", "cannot stand within `not`"),
    ({"not": {"prompt": [[2, 1]]}}, ".not.prompt[0]", "runs backwards"),
]


@pytest.mark.parametrize(("where", "field", "said"), FORMS)
def test_a_fault_of_form_is_told_where_it_stands(where: Any, field: str, said: str) -> None:
    with pytest.raises(SteeringError) as refusal:
        Steering.parse(
            {"interventions": [{"kind": "add", "vector": "v0"}, {"kind": "add", "vector": "v0", "where": where}]}
        )
    assert refusal.value.field == f"interventions[1].where{field}"
    assert said in refusal.value.message


@pytest.mark.parametrize("phase", ["all", "prefill", "decode"])
def test_phase_and_where_are_not_both_said(phase: str) -> None:
    with pytest.raises(
        SteeringError, match=r"interventions\[0\]\.phase: cannot stand beside `where`, which says it as"
    ):
        unplaced([{"phase": phase, "where": {"answer": "all"}}])


IN_PROMPT: list[tuple[dict[str, Any], str, str]] = [
    (
        {"prompt": [[6, None]]},
        ".prompt",
        "selects nothing: the prompt has 6 tokens, at positions from 0, and none of them lies in [6, null]",
    ),
    ({"prompt": [[-9, -6], [10, 20]]}, ".prompt", "none of them lies in [-9, -6] (here [0, 0]), [10, 20]"),
    (
        {"prompt": [[4, -4]]},
        ".prompt",
        "the prompt has 6 tokens, at positions from 0, and none of them lies in [4, -4] (here [4, 2])",
    ),
    ({"prompt": [[6, None], [-9, -7]]}, ".prompt", "lies in [6, null], [-9, -7] (here [0, 0])"),
    ({"prompt": "all", "tokens": [9]}, ".tokens", "selects nothing: the prompt has 6 tokens"),
    ({"prompt": "all", "not": {}}, ".not", "leaves nothing"),
    ({"not": {}}, ".not", "leaves nothing"),
    ({"answer": [[0, 4]], "not": {"answer": [[0, 9]]}}, ".not", "leaves nothing"),
    ({"tokens": [9], "answer": "all", "not": {"tokens": [8, 9, 10]}}, "", "asks for and left by `not`; ch"),
    (
        {"after": [9], "not": {"after": [9]}},
        "",
        "selects nothing: no token of any answer is all that `after` asks for and left by `not`; change one of them",
    ),
    ({"section": "thinking", "not": {"section": "thinking"}}, "", "no token of any answer"),
    (
        {"section": "thinking", "tokens": [7]},
        "",
        "selects nothing: no token of any answer is all that `section` and `tokens` ask for; change one of them",
    ),
    ({"section": {"name": "thinking", "start": [1], "end": [2, 1]}}, ".section", "one tag ends with the other"),
    ({"answer": "all", "tokens": list(range(0, 130 * 2, 2))}, ".tokens[50]", "got the id 100, and this model has 100"),
]


@pytest.mark.parametrize(("where", "field", "said"), IN_PROMPT)
def test_what_a_prompt_makes_empty_is_refused_with_its_length(where: Any, field: str, said: str) -> None:
    with pytest.raises(SteeringError) as refusal:
        unplaced([{"where": {"answer": "all"}}, {"where": where}]).placed(PROMPT)
    assert refusal.value.field == f"interventions[1].where{field}"
    assert said in refusal.value.message


@pytest.mark.parametrize("where", [{"prompt": [[0, 4]]}, {"answer": [[0, 4], [8, None]]}, {"answer": "all"}])
def test_where_as_a_receipt_tells_it_can_be_sent_back(where: dict[str, Any]) -> None:
    placed = unplaced([{"where": where}]).placed(PROMPT)
    told = placed.asked[0].where
    assert told is not None
    again = {"prompt": json.loads(json.dumps(told.prompt)), "answer": json.loads(json.dumps(told.answer))}
    assert not all(again.values())
    assert unplaced([{"where": again}]).placed(PROMPT) == placed
    taken = unplaced([{"where": {"not": again}}]).placed(PROMPT)
    assert taken.asked[0].where == unplaced([{"where": {"not": where}}]).placed(PROMPT).asked[0].where


def test_ids_in_more_ranges_than_a_device_holds_are_refused_in_an_answer_alone() -> None:
    many = list(range(0, 65 * 2, 2))
    prompt = PromptTokens(6, [1, 2, 3, 1, 2, 3])
    with pytest.raises(SteeringError, match=r"where\.tokens: are ids in 65 ranges, of which at most 64"):
        unplaced([{"where": {"tokens": many}}]).placed(prompt)
    placed = unplaced([{"where": {"prompt": "all", "tokens": many}}]).placed(prompt)
    assert placed.asked[0].where == (((1, 2), (4, 5)), (), False)


def test_more_than_engines_hold_is_refused() -> None:
    prompt = PromptTokens(9000, [1] * 9000)
    alternate = {"prompt": [[2 * index, 2 * index + 1] for index in range(2048)]}
    several = [{"where": {"tokens": [index]}} for index in range(5)]
    binary = [{"where": {"prompt": [[at, at + 1] for at in range(64) if at >> bit & 1]}} for bit in range(6)]
    for steps, said in (
        ([{"where": alternate}], "come to 4097 runs of positions in this request, at most 4096 are served"),
        (several, "come to 5 conditions on the answer's tokens"),
        (binary, r"come to 65 programs \(sets of interventions that act together"),
    ):
        with pytest.raises(SteeringError, match="interventions: " + said):
            unplaced(steps).placed(prompt)
    assert unplaced([{"where": {"prompt": alternate["prompt"][1:]}}]).placed(prompt).spans is not None
    with pytest.raises(SteeringError, match="interventions: have 4098 ranges in all their `where`, at most 4096"):
        unplaced([{"where": {"prompt": [[0, 1]] * 2049, "not": {"answer": [[0, 1]] * 2049}}}])
    with pytest.raises(SteeringError, match="interventions: have 65 texts and roles in all their `where`, at most 64"):
        unplaced([{"where": {"prompt": [{"text": "a"}] * 65}}])


# Interventions that never meet

ROLE = {"role": "system"}
GATES = GateLimits(1, frozenset({Site(0, HookPoint.POST_BLOCK)}))


def probe(index: int) -> Probe:
    return Probe(SteeringVector({Site(0, HookPoint.POST_BLOCK): np.eye(8, dtype=np.float32)[index]}), 0.0)


def gated(index: int, where: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "add", "vector": "v0", "where": where, "gate": {"probe": probe(index), "threshold": 0.0}}


NEVER = [
    ({"section": "thinking"}, {"section": "response"}),
    ({"until": [9]}, {"after": [9]}),
    ({"tokens": [5, 6]}, {"tokens": [7], "answer": "all"}),
    ({"answer": [[0, 4]]}, {"answer": [[4, None]]}),
    ({"prompt": [[0, 2]]}, {"prompt": [[2, 3]]}),
    ({"prompt": "all"}, {"answer": "all"}),
]


@pytest.mark.parametrize(("first", "other"), NEVER)
def test_interventions_that_never_meet_need_not_be_servable_together(first: Any, other: Any) -> None:
    sites = ModelSites(8, 1, SITES.sites, gates=GATES)
    spec = {"interventions": [gated(0, first), gated(1, other)]}
    found = Steering.parse(spec).resolve(VECTORS, sites)
    assert isinstance(found, Unplaced)
    placed = found.placed(PROMPT)
    assert all(len(program.gated) <= 1 for program in placed.programs)
    assert any(program.gated for program in placed.programs)


def test_interventions_that_meet_must_be_servable_together() -> None:
    sites = ModelSites(8, 1, SITES.sites, gates=GATES)
    meeting = {"interventions": [gated(0, {"prompt": [[0, 3]]}), gated(1, {"prompt": [[2, 4]]})]}
    found = Steering.parse(meeting).resolve(VECTORS, sites)
    assert isinstance(found, Unplaced)
    with pytest.raises(SteeringError, match=r"interventions: has 2 different gates on one token; this engine serves 1"):
        found.placed(PROMPT)


def test_what_no_prompt_can_change_is_refused_without_one() -> None:
    two = {"all": [{"probe": probe(0), "threshold": 0.0}, {"probe": probe(1), "threshold": 0.0}]}
    spec = {"interventions": [{"kind": "add", "vector": "v0", "where": {"answer": "all"}, "gate": two}]}
    with pytest.raises(SteeringError, match="has 2 different gates on one token; this engine serves 1"):
        Steering.parse(spec).resolve(VECTORS, ModelSites(8, 1, SITES.sites, gates=GATES))
    clamp = {"kind": "clamp", "vector": "v0", "value": 1.0, "where": {"answer": "all"}}
    with pytest.raises(SteeringError, match=r"interventions\[0\]\.kind: this engine does not serve `clamp`"):
        Steering.parse({"interventions": [clamp]}).resolve(VECTORS, SITES)


def test_clamps_that_contradict_each_other_are_refused_where_they_meet() -> None:
    slots = SlotLimits(2, SITES.sites, frozenset({"clamp"}))
    sites = ModelSites(8, 1, SITES.sites, slots=slots)

    def clamps(first: Any, other: Any) -> Unplaced:
        steps = [
            {"kind": "clamp", "vector": "v0", "value": at, "where": where} for at, where in ((1.0, first), (2.0, other))
        ]
        found = Steering.parse({"interventions": steps}).resolve(VECTORS, sites)
        assert isinstance(found, Unplaced)
        return found

    apart = clamps({"section": "thinking"}, {"section": "response"})
    assert len(apart.slots) == 2
    assert apart.placed(PROMPT).spans is not None
    with pytest.raises(SteeringError, match="interventions"):
        clamps({"answer": "all"}, {"section": "response"}).placed(PROMPT)


# What stands beside


def test_a_spec_without_where_is_resolved_as_ever() -> None:
    found = Steering.parse({"interventions": [{"kind": "add", "vector": "v0", "where": None}]}).resolve(VECTORS, SITES)
    assert isinstance(found, ResolvedSteering)
    assert found.spans is None


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"prompt": "all", "answer": [[0, 16]]},
        {"prompt": [[0, 4], [-3, None], {"text": "hi", "occurrence": "all"}, {"role": "user", "turns": "last"}]},
        {"section": "thinking", "after": "x", "until": [1, 2]},
        {
            "section": {"name": "response", "start": [5], "end": "</a>"},
            "not": {"tokens": [3, "y"], "special_tokens": True},
        },
    ],
)
def test_what_is_told_of_a_spec_reads_back_to_it(where: dict[str, Any]) -> None:
    steering = Steering.parse({"interventions": [{"kind": "add", "vector": "v0", "where": where}]})
    told = json.loads(steering.model_dump_json())
    assert Steering.parse(told) == steering
    assert Steering.parse(json.dumps(told)) == steering
    assert set(told["interventions"][0]["where"]) == set(where)
    assert "phase" not in told["interventions"][0]


def test_the_identity_of_a_spec_is_that_of_what_it_does_and_where() -> None:
    same = [unplaced([{"where": {"answer": [[0, 4]]}}]).identity_of_spec for _ in range(2)]
    others = [
        unplaced([{"where": {"answer": [[0, 5]]}}]),
        unplaced([{"where": {"answer": [[0, 4]]}, "scale": 2.0}]),
        unplaced([{"where": {"answer": [[0, 4]]}}, {}]),
        unplaced([{"where": {"prompt": [[0, 4]]}}]),
    ]
    assert same[0] == same[1]
    assert len({same[0], *(one.identity_of_spec for one in others)}) == 5


def test_the_identity_of_a_phase_is_asked_with_a_prompt() -> None:
    steering = Steering.parse({"interventions": [{"kind": "add", "vector": "v0", "where": {"answer": "all"}}]})
    with pytest.raises(SteeringError, match=r"interventions\[0\]\.where: is known with a prompt alone"):
        steering.identity("decode", VECTORS)


def test_phases_beside_a_where_are_places_too() -> None:
    placed = unplaced([{"phase": "prefill"}, {"phase": "decode"}, {}, {"where": {"answer": [[1, 2]]}}]).placed(PROMPT)
    assert acting(placed, [1, 2, 3, 1, 2, 3, 4, 4, 4]) == [{0, 2}] * 6 + [{1, 2}, {1, 2, 3}, {1, 2}]


@pytest.mark.parametrize(
    "where", [IN_PROMPT[0][0], IN_PROMPT[3][0], IN_PROMPT[5][0], IN_PROMPT[8][0], {"prompt": ROLE}]
)
def test_a_default_of_a_server_that_selects_nothing_of_a_prompt_does_nothing_there(where: dict[str, Any]) -> None:
    steps = [{"kind": "add", "vector": f"v{index}", **one} for index, one in enumerate([{"where": where}, {}])]
    found = Steering.parse({"interventions": steps}).resolve(VECTORS, SITES, defaults=1)
    assert isinstance(found, Unplaced)
    placed = found.placed(replace(PROMPT, messages=[], tokenizer=where_tokenizers.MAKERS["bytes_of_gpt"]()))
    assert acting(placed, [1, 2, 3, 1, 2, 3, 4]) == [{1}] * 7
    if where.keys() & {"tokens", "after"}:
        assert acting(found.placed(PromptTokens(6)), [0] * 7) == [{1}] * 7  # of embeddings


def test_a_default_of_a_server_leaves_out_what_a_prompt_does_not_have() -> None:
    tokenizer = where_tokenizers.MAKERS["bytes_of_gpt"]()
    ids = tokenizer("The film was good")["input_ids"]
    prompt = PromptTokens(len(ids), ids, tokenizer)
    here, absent = {"text": "film"}, {"text": "book"}

    def chosen(where: dict[str, Any]) -> Any:
        steps = [{"kind": "add", "vector": "v0", "where": where}]
        found = Steering.parse({"interventions": steps}).resolve(VECTORS, SITES, defaults=1)
        assert isinstance(found, Unplaced)
        return found.placed(prompt).asked[0].where

    assert chosen({"prompt": [absent, here]}) == chosen({"prompt": here})
    assert chosen({"prompt": "all", "not": {"prompt": absent}}) == chosen({"prompt": "all"})
    assert chosen({"prompt": absent, "answer": "all"}) == chosen({"answer": "all"})
    assert chosen({"prompt": absent}) == ((), (), False)


def test_programs_of_ever_other_prompts_are_not_kept_for_ever() -> None:
    bits = [[token for token in range(512) if token >> bit & 1] for bit in range(9)]
    steps = [{"vector": f"v{bit % 8}", "where": {"prompt": "all", "tokens": ids}} for bit, ids in enumerate(bits)]
    several = unplaced(steps)
    for first in range(0, 480, 20):
        ids = [511, *range(first, first + 20)]  # each token receives other interventions
        placed = several.placed(PromptTokens(len(ids), ids))
        assert acting(placed, ids) == [{bit for bit in range(9) if token >> bit & 1} for token in ids]
    assert len(several.made._programs) <= 256
