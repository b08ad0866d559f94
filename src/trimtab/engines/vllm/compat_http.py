"""Every change made to vLLM's servers: the request models and handlers behind each route that can be steered.

What a request says is read by `guard`, before its route. Lines of batches have no route: they are read here.
"""

import functools
import sys
from typing import Any

from trimtab.engines.vllm import doors
from trimtab.engines.vllm.body import Body
from trimtab.engines.vllm.compat_patching import find, put, take
from trimtab.engines.vllm.frontend import FIELD
from trimtab.errors import SteeringError

PROTOCOLS = {  # module, class: the request models that vLLM turns into sampling parameters
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
    "vllm.entrypoints.speech_to_text.transcription.protocol": "TranscriptionRequest",
    "vllm.entrypoints.speech_to_text.translation.protocol": "TranslationRequest",
}

TOKENS_HANDLER = ("vllm.entrypoints.scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens")

MESSAGES_HANDLER = ("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "create_messages")

MESSAGES_RENDERER = ("vllm.entrypoints.scale_out.render.serving", "ServingRender", "render_messages_request")

BATCHES = ("vllm.entrypoints.launchers.run_batch", "vllm.entrypoints.openai.run_batch")  # by version

LINE_PLACES = frozenset(f"body.{place}" for place in doors.PLACES)

_LINE = "_trimtab_line"  # where a line of a batch keeps what was read


def install_http_doors() -> None:
    """Patch what turns HTTP requests into work for the engine."""
    for module, name in PROTOCOLS.items():
        if (request_class := find(module, name)) is not None:
            _patch_protocol(request_class)
    _patch_tokens_handler()
    if (handler_class := find(*MESSAGES_HANDLER[:2], required=False)) is not None:
        _patch_messages(handler_class, MESSAGES_HANDLER[2])
    renderer_class = find(*MESSAGES_RENDERER[:2])
    if hasattr(renderer_class, MESSAGES_RENDERER[2]):  # 0.26 has no such route
        _patch_messages(renderer_class, MESSAGES_RENDERER[2])
    _patch_batches()


def _patch_protocol(request_class: Any) -> None:
    # Why: it runs before a stream is opened, so a refusal is an HTTP 400; `process_inputs` would be too late.
    # Until: vLLM validates sampling parameters before it answers a streaming request.
    original = take(request_class, "to_sampling_params", ["self"])
    if original is None:
        return

    @functools.wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = doors.given_by(self)  # before vLLM's own code, which shares and extends the vllm_xargs dictionary
        params = original(self, *args, **kwargs)
        return doors.admit_http(params, given)

    put(request_class, "to_sampling_params", to_sampling_params)

    if not hasattr(request_class, "to_beam_search_params"):
        return
    beam = take(request_class, "to_beam_search_params", ["self"])
    if beam is None:
        return

    @functools.wraps(beam)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        doors.refuse_beam_search(doors.given_by(self))
        return beam(self, *args, **kwargs)

    put(request_class, "to_beam_search_params", to_beam_search_params)


def _patch_tokens_handler() -> None:
    # Why: this door takes sampling parameters as they are, and may stream. Until: as for `to_sampling_params`.
    if (handler_class := find(*TOKENS_HANDLER[:2], required=False)) is None:
        return
    original = take(handler_class, TOKENS_HANDLER[2], ["self", "request", "raw_request"])
    if original is None:
        return

    @functools.wraps(original)
    async def serve_tokens(self: Any, request: Any, raw_request: Any = None) -> Any:
        if (current := doors.exchange.get()) is not None and current.was_read:
            given = current.given
        else:
            given = (request.sampling_params.extra_args or {}).get(FIELD)
        request.sampling_params = doors.admit_http(request.sampling_params, given)
        return await original(self, request, raw_request)

    put(handler_class, TOKENS_HANDLER[2], serve_tokens)


def _patch_messages(handler_class: Any, method: str) -> None:
    # Why: a refusal that is raised in it is a 400 in newer versions and a 500 in 0.26; returned, it is a 400 in all.
    # Until: 0.26 is not supported any more.
    original = take(handler_class, method, ["self", "request", "raw_request"])
    if original is None:
        return

    @functools.wraps(original)
    async def handle_messages(self: Any, request: Any, raw_request: Any = None) -> Any:
        try:
            return await original(self, request, raw_request)
        except SteeringError as error:
            return self.create_error_response(error)

    put(handler_class, method, handle_messages)


def _patch_batches() -> None:
    # Why: `vllm run-batch` answers without routes, its models keep the last of repeated keys, and requests for
    # embeddings or scores are never sampled. Until: it answers through the routes.
    for name in BATCHES:
        if (module := sys.modules.get(name)) is not None:  # a server does not import it
            _patch_lines(module.BatchRequestInput)
            _patch_line_answers(module)


def _patch_lines(line_class: Any) -> None:
    original = take(line_class, "model_validate_json", ["json_data"])
    if original is None:
        return

    def model_validate_json(cls: Any, json_data: str | bytes, *args: Any, **kwargs: Any) -> Any:
        line = original(json_data, *args, **kwargs)
        line.__dict__[_LINE] = Body.read(json_data)
        return line

    put(line_class, "model_validate_json", classmethod(model_validate_json))


def _patch_line_answers(module: Any) -> None:
    original = take(module, "run_request", ["serving_engine_func", "request"])
    if original is None:
        return

    @functools.wraps(original)
    async def run_request(answer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        line = request.__dict__.get(_LINE) or Body({"body": dict(request.body)})
        current = doors.Exchange(request.url)
        try:
            if not hasattr(request.body, "to_sampling_params"):  # where it would be admitted
                doors.refuse_all(line, request.url)
            current.read(doors.spec_in(line, LINE_PLACES))
        except SteeringError as error:
            answer = functools.partial(_refused, error)
        token = doors.exchange.set(current)
        try:
            told = await original(answer, request, *args, **kwargs)
        finally:
            doors.exchange.reset(token)
        if current.account is not None and told.response is not None and told.response.body is not None:
            setattr(told.response.body, FIELD, current.account.receipt)  # the models take extra fields
        return told

    put(module, "run_request", run_request)


async def _refused(error: SteeringError, body: Any) -> Any:
    doors.refuse(error)
