"""The doors in vLLM's own classes, without an engine: what they admit, what they refuse, and that patches come once."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimtab.engines.vllm import plugin
from trimtab.engines.vllm.carried import MARK, TICKET, Carried
from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.frontend.accounts import Ticket
from trimtab.engines.vllm.frontend.admission import FrontEnd
from trimtab.engines.vllm.patches import patching
from trimtab.errors import SteeringError
from trimtab.serving.registry import VectorRegistry
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

vllm = pytest.importorskip("vllm")

from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.entrypoints.openai.chat_completion.protocol import (  # noqa: E402
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest  # noqa: E402
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

pytestmark = pytest.mark.vllm

SPEC = {"interventions": [{"kind": "add", "vector": "calm", "scale": 2.0}]}

REQUESTS = [
    (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
    (CompletionRequest, {"prompt": "x"}),
    (ResponsesRequest, {"input": "x"}),
]


@pytest.fixture(autouse=True)
def front_end():
    plugin.register()
    calm = SteeringVector({Site(0, HookPoint.POST_BLOCK): np.arange(1.0, 9.0)})
    model = ModelSites(8, 2, frozenset({Site(0, HookPoint.POST_BLOCK)}))
    front_end = FrontEnd(model, VectorRegistry({"calm": calm}))
    requests.set_current_front_end(front_end)
    yield front_end
    requests.set_current_front_end(None)


def request(kind: Any, body: dict[str, Any], **more: Any) -> Any:
    return kind.model_validate({"model": "m", **body, **more})


def test_every_patch_fits_this_vllm_and_is_applied_once():
    patched = [EngineArgs.add_cli_args, EngineArgs.create_engine_config, CompletionRequest.to_sampling_params]
    plugin.register()
    assert patched == [EngineArgs.add_cli_args, EngineArgs.create_engine_config, CompletionRequest.to_sampling_params]
    assert patching.problems == []


def test_a_vllm_that_has_changed_is_noted_and_left_alone(monkeypatch):
    class Changed:
        def to_sampling_params(self, renamed: int) -> None: ...

    before = Changed.to_sampling_params
    monkeypatch.setattr(patching, "problems", [])
    module = SimpleNamespace(Changed=Changed)
    for name, first in (("to_sampling_params", ("self", "max_tokens")), ("gone", ("self",))):
        patching.Patch("vllm.somewhere", f"Changed.{name}", first, lambda original: None).apply(module)  # type: ignore[arg-type]
    assert Changed.to_sampling_params is before
    assert ["renamed" in patching.problems[0], "gone" in patching.problems[1]] == [True, True]


@pytest.mark.parametrize(("kind", "body"), REQUESTS)
def test_both_places_of_a_body_are_admitted_and_the_request_keeps_what_it_said(kind, body):
    for more in ({"steering": SPEC}, {"vllm_xargs": {"steering": json.dumps(SPEC), "other": 1}}):
        made = request(kind, body, **more)
        params = made.to_sampling_params(5, {})
        assert isinstance(params.extra_args["steering"], Carried)
        assert params.extra_args.get("other") == more.get("vllm_xargs", {}).get("other")
        assert (made.vllm_xargs or {}) == more.get("vllm_xargs", {})


@pytest.mark.parametrize(("kind", "body"), REQUESTS)
def test_a_refusal_is_vllms_validation_error_and_a_value_error_and_names_the_field(kind, body):
    made = request(kind, body, steering={"interventions": [{"kind": "add", "vector": "nobody"}]})
    with pytest.raises(VLLMValidationError) as caught:
        made.to_sampling_params(5, {})
    assert isinstance(caught.value, SteeringError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.parameter == "steering.interventions[0].vector"
    assert str(caught.value).startswith("steering.interventions[0].vector: there is no vector 'nobody'")


@pytest.mark.parametrize(("kind", "body"), REQUESTS)
def test_a_server_without_steering_refuses_to_answer_a_steered_request_unsteered(kind, body):
    requests.set_current_front_end(None)
    with pytest.raises(VLLMValidationError, match="--enable-steering"):
        request(kind, body, steering=SPEC).to_sampling_params(5, {})
    assert not request(kind, body).to_sampling_params(5, {}).extra_args


def test_a_render_route_checks_a_spec_and_hands_it_on_as_it_was_written():
    for path in ("/v1/completions/render", "/v1/chat/completions/render"):
        for given, fault in ((SPEC, None), ({"interventions": [{"kind": "add", "vector": "nobody"}]}, "vector")):
            current = requests.Exchange(path)
            current.read(given)
            token = requests.exchange.set(current)
            try:
                if fault is None:
                    carried = requests.admit_http(SamplingParams(extra_args={"other": 1}), given).extra_args
                    assert carried == {"other": 1, "steering": json.dumps(given)}
                else:
                    with pytest.raises(VLLMValidationError, match="nobody"):
                        requests.admit_http(SamplingParams(), given)
            finally:
                requests.exchange.reset(token)


@pytest.mark.parametrize("field", ["prompt", "prompt[1]", "not.prompt"])
def test_a_render_route_refuses_a_role_which_no_server_behind_it_could_know(front_end, field):
    prompt = {"prompt": {"role": "user"}, "prompt[1]": [[0, 1], {"role": "user"}], "not.prompt": {"role": "user"}}[
        field
    ]
    where = {"not": {"prompt": prompt}} if field.startswith("not") else {"prompt": prompt}
    given = {"interventions": [*SPEC["interventions"], {"kind": "add", "vector": "calm", "where": where}]}
    texts = {"interventions": [{"kind": "add", "vector": "calm", "where": {"prompt": {"text": "role"}}}]}
    requests.set_current_front_end(FrontEnd(front_end.model, front_end.registry, {**given, "binding": False}))
    token = requests.exchange.set(requests.Exchange("/v1/chat/completions/render"))
    try:
        with pytest.raises(VLLMValidationError, match="gets token ids and no messages") as caught:
            requests.admit_http(SamplingParams(), given)
        assert caught.value.parameter == f"steering.interventions[1].where.{field}.role"
        assert requests.admit_http(SamplingParams(), texts).extra_args == {"steering": json.dumps(texts)}
    finally:
        requests.exchange.reset(token)


def test_beam_search_is_refused_where_the_request_or_the_servers_default_steers(front_end):
    requests.refuse_beam_search(None)
    with pytest.raises(VLLMValidationError, match="cannot be steered; leave"):
        requests.refuse_beam_search(SPEC)
    requests.set_current_front_end(FrontEnd(front_end.model, front_end.registry, SPEC))
    with pytest.raises(VLLMValidationError, match="steers every request"):
        requests.refuse_beam_search(None)


def test_an_answer_is_steered_by_what_names_stood_for_at_its_first_prompt(front_end):
    spec = {"interventions": [{"kind": "add", "vector": "mood"}]}
    site = Site(0, HookPoint.POST_BLOCK)

    def answer(*registered: float) -> list[dict]:
        """What each prompt of one answer carries, before which the name is registered anew."""
        token = requests.exchange.set(requests.Exchange("/v1/completions"))
        try:
            carried = []
            for number in registered:
                front_end.registry.add("mood", SteeringVector({site: np.full(8, number)}))
                carried.append(requests.admit_http(SamplingParams(), spec).extra_args)
            return carried
        finally:
            requests.exchange.reset(token)

    first, *others = answer(1.0, 2.0, 3.0)
    told = first[TICKET].account.receipt["vectors"][0]["digest"]
    assert told == SteeringVector({site: np.full(8, 1.0)}).digest.hex()
    for later in others:
        assert later["steering"] is first["steering"]
        assert later[TICKET].account is first[TICKET].account
    (anew,) = answer(2.0)
    assert anew[TICKET].account.receipt["vectors"][0]["digest"] != told


def test_each_conversation_of_a_batch_request_is_steered():
    made = BatchChatCompletionRequest(model="m", messages=[[{"role": "user", "content": "x"}]], steering=SPEC)
    single = made.to_chat_completion_request(made.messages[0])
    assert isinstance(single.to_sampling_params(5, {}).extra_args["steering"], Carried)


@pytest.mark.parametrize("form", [SPEC, json.dumps(SPEC), Steering.parse(SPEC)], ids=["mapping", "json", "Steering"])
def test_steering_is_admitted_apart_from_a_copy_of_the_sampling_parameters_and_put_back(front_end, form):
    params = SamplingParams(extra_args={"steering": form, "other": 1})
    bare, carried = requests.admit_params(front_end, params)
    assert params.extra_args == {"steering": form, "other": 1}
    assert bare.extra_args == {"other": 1}
    assert carried is not None
    wire, ticket = carried["steering"], carried[TICKET]
    assert isinstance(wire, Carried)
    assert isinstance(ticket, Ticket)
    own = bare.clone()
    requests.carry(own, carried)
    assert own.extra_args == {"other": 1, "steering": wire, TICKET: ticket}
    assert bare.extra_args == {"other": 1}
    again = requests.admit_params(front_end, own)[1]
    assert again is not None
    assert again["steering"] is wire
    assert again[TICKET] is ticket
    assert own.clone().extra_args["steering"] is wire
    assert own.clone().extra_args[TICKET] is ticket
    plain = SamplingParams()
    assert requests.admit_params(front_end, plain) == (plain, None)
    requests.carry(plain, None)
    requests.mark(None, plain)
    assert plain.extra_args is None
    requests.mark(front_end, plain)
    assert plain.extra_args == {MARK: True}
    requests.mark(front_end, None)  # a pooling request


@pytest.mark.parametrize(
    ("extra", "place"),
    [
        ({"Steering": SPEC}, "extra_args.Steering"),
        ({"apply_steering_vectors": []}, "extra_args.apply_steering_vectors"),
        ({"hotwire": "[]"}, "extra_args.hotwire"),
        ({"extra_body": {"steering": SPEC}}, "extra_args.extra_body.steering"),
        ({"steering": SPEC, "steer": "{}"}, "extra_args.steer"),
        ({"trimtab": "{}"}, "extra_args.trimtab"),
    ],
)
def test_in_python_another_name_for_steering_is_refused_where_the_engine_steers(front_end, extra, place):
    with pytest.raises(ValueError, match="would be ignored") as caught:
        requests.admit_params(front_end, SamplingParams(extra_args=extra))
    assert caught.value.field == place
    more = {"ngram_size": 3, "steer": None, "kv_transfer_params": {"steering": 1}}
    assert requests.admit_params(front_end, SamplingParams(extra_args=more))[0].extra_args == more
    if "steering" not in extra:
        assert requests.admit_params(None, SamplingParams(extra_args=extra))[1] is None


def test_vllm_is_handed_no_steering_to_copy_and_the_request_that_it_makes_carries_it(front_end, monkeypatch):
    from vllm.v1.engine.input_processor import InputProcessor

    seen = []

    def process_inputs(
        self: Any, request_id: Any, prompt: Any, params: Any, supported_tasks: Any, resumable: bool = False
    ) -> Any:
        seen.append(params)
        return SimpleNamespace(sampling_params=params.clone(), prompt_token_ids=[3], prompt_embeds=None)

    monkeypatch.setattr(InputProcessor, "process_inputs", process_inputs)
    plugin.register()
    processor = InputProcessor.__new__(InputProcessor)
    processor._trimtab_front_end = front_end
    params = SamplingParams(extra_args={"steering": SPEC})
    request = processor.process_inputs("r", "x", params, ())
    assert seen[0].extra_args is None
    assert request.sampling_params.extra_args["steering"] is front_end.admit(SPEC)
    assert MARK in request.sampling_params.extra_args
    assert processor.process_inputs("r", "x", SamplingParams(), ()).sampling_params.extra_args == {MARK: True}
    assert params.extra_args == {"steering": SPEC}


def test_a_wire_form_from_a_caller_is_not_taken_for_an_admitted_one(front_end):
    forged = dict(front_end.admit(SPEC))
    with pytest.raises(ValueError, match="unknown key"):
        requests.admit_params(front_end, SamplingParams(extra_args={"steering": forged}))


def test_a_request_whose_prompt_grows_is_refused_if_it_is_steered(front_end):
    with pytest.raises(ValueError, match="grows"):
        requests.admit_params(front_end, SamplingParams(extra_args={"steering": SPEC}), resumable=True)
    requests.admit_params(front_end, SamplingParams(), resumable=True)


def test_vllms_own_parser_knows_the_flags_and_ends_with_a_message_for_bad_ones(capsys, tmp_path):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    model = ["--model", str(tmp_path)]  # a folder that exists: nothing is looked up elsewhere
    more = ["--steering-layers", "1-2", "--additional-config", '{"other": 1}']
    args = parser.parse_args([*model, "--enable-steering", *more])
    assert args.additional_config == {"other": 1, "steering": {"layers": "1-2"}}
    assert AsyncEngineArgs.from_cli_args(args).additional_config == args.additional_config
    with pytest.raises(SystemExit):
        parser.parse_args(["--steering-layers", "1-2"])
    assert "without --enable-steering" in capsys.readouterr().err


def test_a_process_that_makes_no_engine_configuration_imports_nothing_of_the_server():
    code = (
        "import sys; from trimtab.engines.vllm import plugin\n"
        "plugin.register()\n"
        "print([name for name in sys.modules if name == 'vllm' or name.startswith(('vllm.', 'torch', 'fastapi'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
