"""Every change made to vLLM's servers: the request models and handlers behind each route that can be steered.

What a request says is read by `guard`, before its route. Lines of batches have no route: they are read here. How a
patch is put in, and what happens where it does not fit, is in `patches.patching`.
"""

import functools
from typing import Any

from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.frontend.admission import FIELD
from trimtab.engines.vllm.http.body import Body
from trimtab.engines.vllm.patches.patching import Need, Patch, install_table
from trimtab.errors import SteeringError

PROTOCOLS = {  # module, class: the request models that vLLM turns into sampling parameters
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
    "vllm.entrypoints.speech_to_text.transcription.protocol": "TranscriptionRequest",
    "vllm.entrypoints.speech_to_text.translation.protocol": "TranslationRequest",
}

TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.serving"

MESSAGES = "vllm.entrypoints.anthropic.serving"

RENDERER = "vllm.entrypoints.scale_out.render.serving"

BATCHES = {  # module: whether some versions have only another name for it there
    "vllm.entrypoints.launchers.run_batch": False,
    "vllm.entrypoints.openai.run_batch": True,
}

HTTP_MODULES: dict[str, Need] = {  # a server imports no module of batches
    **{module: Need.LIBRARIES if "speech" in module else Need.ALWAYS for module in PROTOCOLS},
    RENDERER: Need.ALWAYS,
    **dict.fromkeys((TOKENS, MESSAGES), Need.BY_VERSION),
}

LINE_PLACES = frozenset(f"body.{place}" for place in requests.PLACES)

_LINE = "_trimtab_line"  # where a line of a batch keeps what was read


def install_http_doors() -> None:
    """Patch what turns HTTP requests into work for the engine, each as soon as vLLM imports it."""
    install_table(TABLE)


def _admit_before_the_stream(original: Any) -> Any:
    """Why: it runs before a stream is opened, so a refusal is an HTTP 400; `process_inputs` would be too late.
    Until: vLLM validates sampling parameters before it answers a streaming request.
    """

    @functools.wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = requests.given_by(self)  # before vLLM's own code, which shares and extends the vllm_xargs dictionary
        params = original(self, *args, **kwargs)
        return requests.admit_http(params, given)

    return to_sampling_params


def _refuse_beams(original: Any) -> Any:
    """Why: a beam resubmits its own tokens as a prompt. Until: beam search keeps one request per beam."""

    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        requests.refuse_beam_search(requests.given_by(self))
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _admit_tokens(original: Any) -> Any:
    """Why: this door takes sampling parameters as they are, and may stream. Until: as for `to_sampling_params`."""

    @functools.wraps(original)
    async def serve_tokens(self: Any, request: Any, raw_request: Any = None) -> Any:
        if (current := requests.exchange.get()) is not None and current.was_read:
            given = current.given
        else:
            given = (request.sampling_params.extra_args or {}).get(FIELD)
        request.sampling_params = requests.admit_http(request.sampling_params, given)
        return await original(self, request, raw_request)

    return serve_tokens


def _return_refusals(original: Any) -> Any:
    """Why: a refusal that is raised in it is a 400 in newer versions and a 500 in 0.26; returned, it is a 400 in all.
    Until: 0.26 is not supported any more.
    """

    @functools.wraps(original)
    async def handle_messages(self: Any, request: Any, raw_request: Any = None) -> Any:
        try:
            return await original(self, request, raw_request)
        except SteeringError as error:
            return self.create_error_response(error)

    return handle_messages


def _read_lines(original: Any) -> Any:
    """Why: `vllm run-batch` answers without routes, and its models keep the last of repeated keys. Until: it answers
    through the routes.
    """

    def model_validate_json(cls: Any, json_data: str | bytes, *args: Any, **kwargs: Any) -> Any:
        line = original(json_data, *args, **kwargs)
        line.__dict__[_LINE] = Body.read(json_data)
        return line

    return classmethod(model_validate_json)


def _answer_lines(original: Any) -> Any:
    """Why: as above, and requests for embeddings or scores are never sampled. Until: as above."""

    @functools.wraps(original)
    async def run_request(answer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        line = request.__dict__.get(_LINE) or Body({"body": dict(request.body)})
        current = requests.Exchange(request.url)
        try:
            if not hasattr(request.body, "to_sampling_params"):  # where it would be admitted
                requests.refuse_all(line, request.url)
            current.read(requests.spec_in(line, LINE_PLACES))
        except SteeringError as error:
            answer = functools.partial(_refused, error)
        token = requests.exchange.set(current)
        try:
            told = await original(answer, request, *args, **kwargs)
        finally:
            requests.exchange.reset(token)
        if current.account is not None and told.response is not None and told.response.body is not None:
            setattr(told.response.body, FIELD, current.account.receipt)  # the models take extra fields
        return told

    return run_request


async def _refused(error: SteeringError, body: Any) -> Any:
    requests.refuse(error)


_REQUEST = ("self", "request", "raw_request")

TABLE: tuple[Patch, ...] = (
    *(Patch(module, f"{name}.to_sampling_params", ("self",), _admit_before_the_stream)
      for module, name in PROTOCOLS.items()),
    *(Patch(module, f"{name}.to_beam_search_params", ("self",), _refuse_beams, optional=True)
      for module, name in PROTOCOLS.items()),
    Patch(TOKENS, "ServingTokens.serve_tokens", _REQUEST, _admit_tokens),
    Patch(MESSAGES, "AnthropicServingMessages.create_messages", _REQUEST, _return_refusals),
    Patch(RENDERER, "ServingRender.render_messages_request", _REQUEST, _return_refusals, optional=True),  # not in 0.26
    *(Patch(module, "BatchRequestInput.model_validate_json", ("json_data",), _read_lines, optional=optional)
      for module, optional in BATCHES.items()),
    *(Patch(module, "run_request", ("serving_engine_func", "request"), _answer_lines, optional=optional)
      for module, optional in BATCHES.items()),
)  # fmt: skip
