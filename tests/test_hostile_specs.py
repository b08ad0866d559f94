"""Objects that no careful client writes are refused like any other fault, never answered by an internal error."""

import json
from typing import Any

import pytest

from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.spec import Gate, Steering

ADD: dict[str, Any] = {"kind": "add", "vector": "calm"}
GATE: dict[str, Any] = {"probe": "anger", "threshold": 1.0}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def within_one_another(depth: int) -> dict[str, Any]:
    gate = GATE
    for _ in range(depth):
        gate = {"all": [gate]}
    return gate


def add(**keys: Any) -> dict[str, Any]:
    return {"interventions": [ADD | keys]}


@pytest.mark.parametrize("key", ["self", "cls", "data", "__class__", "model_config"])
@pytest.mark.parametrize(
    "place",
    [
        "",
        *(f"interventions[0]{place}" for place in ("", ".gate", ".gate.any[1]", ".where", ".where.not")),
        *(f"interventions[0].where.{place}" for place in ("prompt", "prompt[1]", "section", "not.section")),
    ],
)
def test_a_key_that_python_uses_itself_is_an_unknown_key_everywhere(key: str, place: str) -> None:
    spec = {
        "": {"interventions": [ADD], key: 1},
        "interventions[0]": add(**{key: 1}),
        "interventions[0].gate": add(gate=GATE | {key: 1}),
        "interventions[0].gate.any[1]": add(gate={"any": [GATE, GATE | {key: 1}]}),
        "interventions[0].where": add(where={key: 1}),
        "interventions[0].where.not": add(where={"not": {key: 1}}),
        "interventions[0].where.prompt": add(where={"prompt": {"text": "x", key: 1}}),
        "interventions[0].where.prompt[1]": add(where={"prompt": [[0, 1], {"role": "user", key: 1}]}),
        "interventions[0].where.section": add(where={"section": {"name": "thinking", key: 1}}),
        "interventions[0].where.not.section": add(where={"not": {"section": {"name": "thinking", key: 1}}}),
    }[place]
    with pytest.raises(SteeringError, match=r"unknown key.*the keys are") as caught:
        Steering.parse(spec)
    assert caught.value.field == f"{place}.{key}".removeprefix(".")


def test_a_monitor_described_with_the_key_self_is_refused_as_a_gate_is() -> None:
    with pytest.raises(SteeringError, match="unknown key"):
        Gate(**(GATE | {"self": 1}))


@pytest.mark.parametrize("spec", [{"interventions": [ADD | {1: 2}]}, add(gate=GATE | {3: 2}), add(where={3: 2})])  # type: ignore[dict-item]
def test_a_key_that_is_no_text_is_refused_within_a_spec_too(spec: Any) -> None:
    with pytest.raises(SteeringError, match="keys are text"):
        Steering.parse(spec)


@pytest.mark.parametrize(
    "keys",
    [
        {"kind": nested(5000)},
        {"scale": nested(5000)},
        {"phase": nested(5000)},
        {"layers": nested(5000)},
        {"vector": nested(5000)},
        {"vector": {"post_block": nested(5000)}},
        {"vector": {"post_block": {"1": nested(5000)}}},
        {"vector": {"post_block": dict.fromkeys(("dtype", "shape", "layer_indices", "data"), nested(5000))}},
        {"gate": nested(5000)},
        {"gate": GATE | {"threshold": nested(5000)}},
        {"gate": GATE | {"invert": nested(5000)}},
        {"gate": GATE | {"probe": {"post_block": {"1": [1.0]}, "bias": nested(5000)}}},
        {"gate": {"all": nested(5000)}},
        {"gate": {"any": [GATE, nested(5000)]}},
        {"gate": {"all": [GATE, GATE | {"threshold": nested(5000)}]}},
        {"gate": within_one_another(5000)},
        *({"where": place} for place in (nested(5000), {"not": nested(5000)}, {"not": {"not": nested(5000)}})),
        *({"where": {key: nested(5000)}} for key in ("prompt", "answer", "section", "after", "tokens")),
        *({"where": {"prompt": place}} for place in ([nested(5000)], [[0, nested(5000)]], {"text": nested(5000)})),
        {"where": {"section": {"name": nested(5000), "start": nested(5000)}}},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_value_nested_deeper_than_python_prints_is_refused_at_its_place(keys: dict[str, Any]) -> None:
    with pytest.raises(SteeringError) as caught:
        Steering.parse(add(**keys))
    assert caught.value.field.startswith(f"interventions[0].{next(iter(keys))}")


@pytest.mark.parametrize("depth", [990, 5000, 100_000])
def test_a_text_nested_deeply_is_refused(depth: int) -> None:
    text = '{"interventions": [{"kind": "add", "vector": "calm", "scale": ' + "[" * depth + "]" * depth + "}]}"
    with pytest.raises(SteeringError):
        Steering.parse(text)


def test_half_a_surrogate_pair_in_a_key_leaves_a_message_that_can_be_sent() -> None:
    with pytest.raises(SteeringError) as caught:
        Steering.parse(json.dumps(add(vector={"post_block": {"\ud800": [1.0]}})))
    assert str(caught.value).encode("utf-8")
    assert caught.value.field == "interventions[0].vector.post_block.\\ud800"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        (b"\x78\x00\x00\x00\x00\x00\x00\x00{", "is not"),  # how a safetensors file begins
        ("{}".encode("utf-16"), "not text in UTF-8"),
        (b"\xff", "not text in UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "b": 2, "a": 1}', "'a' is given twice"),
        ('{"a": {"b": 1, "b": null}}', "'b' is given twice"),
        ("9" * 10_000, "is not JSON"),
    ],
)
def test_what_is_no_json_is_refused_in_words_about_json(text: str | bytes, words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        read_json(text)


def test_json_may_begin_with_a_byte_order_mark() -> None:
    assert read_json(b'\xef\xbb\xbf{"a": [1]}') == {"a": [1]}
