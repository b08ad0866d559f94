"""Where a body asks for steering: which keys count, which are somebody's data, and what a repeated key hides."""

import json
from typing import Any

import pytest

from trimtab.engines.vllm.frontend.body import Body, names_steering

SPEC = {"interventions": [{"kind": "add", "vector": "calm"}]}


def places(body: Any, **options: bool) -> list[str]:
    return [ask.place for ask in Body.read(body if isinstance(body, str) else json.dumps(body)).asks(**options)]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"steering": SPEC}, "steering"),
        ({"steering": "no spec"}, "steering"),
        ({"vllm_xargs": {"steering": "..."}}, "vllm_xargs.steering"),
        ({"Steering": SPEC}, "Steering"),
        ({"STEERING": SPEC}, "STEERING"),
        ({"steerings": SPEC}, "steerings"),
        ({"stering": SPEC}, "stering"),
        ({"steernig": SPEC}, "steernig"),
        ({"sterring-vectors": SPEC}, "sterring-vectors"),
        ({"steering ": SPEC}, "steering "),
        ({"\uff33teering": SPEC}, "\uff33teering"),  # a full-width letter
        ({"st\u0435ering": SPEC}, "st\u0435ering"),  # a Cyrillic one
        ({"interventions": SPEC["interventions"]}, "interventions"),
        ({"extra_body": {"steering": SPEC}}, "extra_body.steering"),
        ({"extra_body": json.dumps({"steering": SPEC})}, "extra_body.steering"),
        ({"extra_body": {"extra_body": {"steering": SPEC}}}, "extra_body.extra_body.steering"),
        ({"extra_args": {"steering": SPEC}}, "extra_args.steering"),
        ({"sampling_params": {"steering": SPEC}}, "sampling_params.steering"),
        ({"sampling_params": {"extra_args": {"steering": SPEC}}}, "sampling_params.extra_args.steering"),
        ({"chat_template_kwargs": {"steering": SPEC}}, "chat_template_kwargs.steering"),
        ({"metadata": {"steering": json.dumps(SPEC)}}, "metadata.steering"),
        ({"messages": [{"role": "user", "content": "x", "steering": SPEC}]}, "messages[0].steering"),
        ({"messages": [{"content": ["x", {"type": "text", "steering": SPEC}]}]}, "messages[0].content[1].steering"),
        ({"input": [{"role": "user", "content": "x", "steering": SPEC}]}, "input[0].steering"),
        ({"steering_vectors": {}}, "steering_vectors"),
        ({"decode_steering_vectors": {}}, "decode_steering_vectors"),
        ({"steer_vector_request": {}}, "steer_vector_request"),
        ({"activationSteering": {}}, "activationSteering"),
        ({"control_vectors": []}, "control_vectors"),
        ({"vllm_xargs": {"apply_steering_vectors": "[]"}}, "vllm_xargs.apply_steering_vectors"),
        ({"vllm_xargs": {"steer": "{}"}}, "vllm_xargs.steer"),
        ({"vllm_xargs": {"hotwire": "{}"}}, "vllm_xargs.hotwire"),
        ({"vllm_xargs": {"trimtab": "{}"}}, "vllm_xargs.trimtab"),
        ({"intervention": SPEC["interventions"][0]}, "intervention"),
        ({"activation_additions": []}, "activation_additions"),
        ({"control_vector_scaled": {}}, "control_vector_scaled"),
        ({"hotwire_config": {}}, "hotwire_config"),
        ({"options": [0, {"steering": SPEC}]}, "options[1].steering"),
        ({"parameters": {"steering": SPEC}}, "parameters.steering"),  # as servers with one object of options have it
        ({"body": {"parameters": {"steering": SPEC}}}, "body.parameters.steering"),  # a line of a batch
        ({"text": {"steering": SPEC}}, "text.steering"),
        ({"response_format": {"steering": SPEC}}, "response_format.steering"),
        ({"structured_outputs": {"steering": SPEC}}, "structured_outputs.steering"),
        ({"logit_bias": {"steering": 1.0}}, "logit_bias.steering"),
    ],
)
def test_whatever_can_only_mean_steering_is_found(body: dict[str, Any], place: str) -> None:
    assert places({"model": "m", "prompt": [1, 2], **body}) == [place]


def test_an_escape_in_a_key_changes_nothing() -> None:
    assert places('{"ste\\u0065ring": {}}') == ["steering"]


PARAMETERS = {"type": "object", "properties": {"steering": {"type": "number"}}, "required": ["steering"]}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": 'set "steering": {"interventions": []} please'},
        {"messages": [{"role": "user", "content": "steering"}, {"role": "user", "content": [{"text": "steering"}]}]},
        {"tools": [{"type": "function", "function": {"name": "steering", "parameters": PARAMETERS}}]},
        {"tools": [{"name": "drive", "input_schema": PARAMETERS}]},
        {"functions": [{"name": "drive", "parameters": PARAMETERS}]},
        {"messages": [{"tool_calls": [{"function": {"name": "drive", "arguments": {"steering": 1}}}]}]},
        {"messages": [{"content": [{"type": "tool_use", "name": "drive", "input": {"steering": 1}}]}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": PARAMETERS}}},
        {"response_format": {"type": "json_object", "schema": PARAMETERS}},
        {"structured_outputs": {"json": PARAMETERS}},
        {"structured_outputs": {"structural_tag": {"format": {"tags": [{"content": {"json_schema": PARAMETERS}}]}}}},
        {"output_config": {"format": {"type": "json_schema", "schema": PARAMETERS}}},
        {"tool_choice": {"allowed_tools": {"tools": [{"function": {"name": "x", "parameters": PARAMETERS}}]}}},
        {"prompt": {"id": "p", "variables": {"steering": "of ships"}}},
        {"text": {"format": {"type": "json_schema", "schema": PARAMETERS}}},
        {"documents": [{"steering": "of ships"}]},
        {"metadata": {"steering": "committee"}},
        {"chat_template_kwargs": {"steerlm_quality": 4}},
        {"logit_bias": {"5": 1.0}},
        {"steering": None, "vllm_xargs": {"steering": None}},
        {"string": 1, "streaming": 1, "stream": True, "staring": 1, "x": "steering"},
        {"prompt": [[1, 2], [3]], "temperature": float("nan")},
        [{"a": 1}], 7, None,
    ],
)  # fmt: skip
def test_what_users_and_models_write_is_theirs(body: Any) -> None:
    assert places(body) == []


def test_a_repeated_key_hides_nothing() -> None:
    for text, found in {
        '{"steering": {}, "steering": null}': ["steering", "steering"],
        '{"steering": null, "ste\\u0065ring": {}}': ["steering", "steering"],
        '{"vllm_xargs": {"steering": "x"}, "vllm_xargs": {}}': ["vllm_xargs.steering"],
        '{"extra": {"a": 1, "a": {"steering": 1}}}': ["extra.a.steering"],
    }.items():
        asks = list(Body.read(text).asks())
        assert [ask.place for ask in asks] == found
        assert all(ask.twice for ask in asks)
    assert places('{"model": "a", "model": "b", "prompt": "x"}') == []
    form = Body.of_form([("file", b"RIFF"), ("steering", "{}"), ("steering", ""), ("granularities[]", "a")])
    assert [ask.twice for ask in form.asks()] == [True, True]


def test_a_key_that_an_object_within_a_spec_repeats_is_found() -> None:
    body = Body.read('{"steering": {"interventions": [{"kind": "add", "scale": 1, "vector": "v", "scale": 2}]}}')
    (ask,) = body.asks()
    assert (ask.twice, body.key_given_twice(ask.value)) == (False, "scale")
    once = Body.read('{"steering": {"interventions": []}, "model": 1, "model": 2}')
    assert once.key_given_twice(next(once.asks()).value) is None


def test_without_steering_only_our_own_name_counts_and_other_plugins_keep_theirs() -> None:
    for body in ({"Steering": SPEC}, {"extra_body": {"steering": SPEC}}, {"vllm_xargs": {"steering": "{}"}}):
        assert len(places(body, ours_alone=True)) == 1
    for body in (
        {"steering_vectors": {}},
        {"vllm_xargs": {"hotwire": "{}"}},
        {"chat_template_kwargs": {"steering": 1}},
    ):
        assert places(body, ours_alone=True) == []


def test_a_body_nested_as_deeply_as_python_reads_is_searched() -> None:
    deep = '{"a":' * 400 + '{"steering": 1}' + "}" * 400
    assert places(deep)[0].endswith(".a.steering")


def test_keys_without_end_do_not_fill_the_memory() -> None:
    from trimtab.engines.vllm.frontend import body

    for start in range(0, 30_000, 100):
        Body.read(json.dumps({f"key{number}": 1 for number in range(start, start + 100)}))
    Body.read(json.dumps({"k" * 1_000_000: 1}))
    assert len(body._harmless) <= body._MOST_HARMLESS + 100
    assert max(map(len, body._harmless)) <= 64
    assert names_steering("steering")
