"""Every change made to vLLM's servers: the request models and handlers behind each route that can be steered.

Routes that cannot be are left to `guard`. Batches and realtime sessions have none: what they ask is refused here.
"""

import functools
import sys
from typing import Any

from trimtab.engines.vllm import doors
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

HANDLERS = {  # module: class, method: what answers those requests, or renders them for another server
    "vllm.entrypoints.openai.chat_completion.serving": ("OpenAIServingChat", "create_chat_completion"),
    "vllm.entrypoints.openai.completion.serving": ("OpenAIServingCompletion", "create_completion"),
    "vllm.entrypoints.openai.responses.serving": ("OpenAIServingResponses", "create_responses"),
    "vllm.entrypoints.scale_out.render.serving": ("ServingRender", "render_chat_request"),
}

TOKENS_HANDLER = ("vllm.entrypoints.scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens")

MESSAGES_HANDLER = ("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "create_messages")

MESSAGES_RENDERER = ("vllm.entrypoints.scale_out.render.serving", "ServingRender", "render_messages_request")

REALTIME = ("vllm.entrypoints.speech_to_text.realtime.connection", "RealtimeConnection", "handle_event")

BATCHES = ("vllm.entrypoints.launchers.run_batch", "vllm.entrypoints.openai.run_batch")  # by version


def install_http_doors() -> None:
    """Patch what turns HTTP requests into work for the engine."""
    for module, name in PROTOCOLS.items():
        if (request_class := find(module, name)) is not None:
            _patch_protocol(request_class)
    for module, (name, method) in HANDLERS.items():
        if (handler_class := find(module, name)) is not None:
            _patch_handler(handler_class, method)
    _patch_tokens_handler()
    if (handler_class := find(*MESSAGES_HANDLER[:2], required=False)) is not None:
        _patch_messages(handler_class, MESSAGES_HANDLER[2])
    renderer_class = find(*MESSAGES_RENDERER[:2])
    if hasattr(renderer_class, MESSAGES_RENDERER[2]):  # 0.26 has no such route
        _patch_messages(renderer_class, MESSAGES_RENDERER[2])
    _patch_realtime()
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


def _patch_handler(handler_class: Any, method: str) -> None:
    # Why: the response models take extra fields, but nothing lets a plugin fill one. Until: something does.
    original = take(handler_class, method, ["self", "request"])
    if original is None:
        return

    @functools.wraps(original)
    async def handle(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (given := doors.forwarded.get()) is not None:
            request.model_extra[FIELD] = given
        answer = await original(self, request, *args, **kwargs)
        current = doors.exchange.get()
        # A stream is a generator: its receipt is the header alone. An error answer has no steering to report.
        if current is not None and current.admission is not None and hasattr(answer, "model") and hasattr(answer, "id"):
            setattr(answer, FIELD, await doors.receipt_of(current.admission, answer.id))
        return answer

    put(handler_class, method, handle)


def _patch_tokens_handler() -> None:
    # Why: this door takes sampling parameters as they are, may stream, and its request model drops unknown fields, so a
    # top-level "steering" would be ignored without a word. Until: as for `to_sampling_params`.
    if (handler_class := find(*TOKENS_HANDLER[:2], required=False)) is None:
        return
    original = take(handler_class, TOKENS_HANDLER[2], ["self", "request", "raw_request"])
    if original is None:
        return

    @functools.wraps(original)
    async def serve_tokens(self: Any, request: Any, raw_request: Any = None) -> Any:
        given = await _dropped(request, raw_request)
        inner = (request.sampling_params.extra_args or {}).get(FIELD)
        given = doors.one_of(given, inner, "sampling_params.extra_args")
        request.sampling_params = doors.admit_http(request.sampling_params, given)
        return await original(self, request, raw_request)

    put(handler_class, TOKENS_HANDLER[2], serve_tokens)


def _patch_messages(handler_class: Any, method: str) -> None:
    # Why: its request model drops unknown fields too. It makes a chat request and hands that to the chat handler, to
    # which the spec is passed around it. Until: the model keeps them.
    original = take(handler_class, method, ["self", "request", "raw_request"])
    if original is None:
        return

    @functools.wraps(original)
    async def handle_messages(self: Any, request: Any, raw_request: Any = None) -> Any:
        token = doors.forwarded.set(None)
        try:
            doors.forwarded.set(await _dropped(request, raw_request))
            return await original(self, request, raw_request)
        except SteeringError as error:  # raised, it is a 400 in newer versions and a 500 in 0.26; returned, in all
            return self.create_error_response(error)
        finally:
            doors.forwarded.reset(token)

    put(handler_class, method, handle_messages)


async def _dropped(request: Any, raw_request: Any) -> Any:
    """What a body says as `steering` in places that the model of `request` has no field for."""
    if raw_request is None:
        return None
    body = await raw_request.json()  # parsed already, and kept by the request
    inner = None if hasattr(request, "vllm_xargs") else doors.in_xargs(body.get("vllm_xargs"))
    return doors.one_of(body.get(FIELD), inner, "vllm_xargs")


def _patch_realtime() -> None:
    # Why: a session has no place for a spec and reads the fields it knows. Until: its events are validated.
    if (connection_class := find(*REALTIME[:2])) is None:
        return
    original = take(connection_class, REALTIME[2], ["self", "event"])
    if original is None:
        return

    @functools.wraps(original)
    async def handle_event(self: Any, event: Any) -> Any:
        place = doors.asking(event) or doors.asking(event.get("session") if isinstance(event, dict) else None)
        if place is not None:
            return await self.send_error(str(doors.refusal_elsewhere("a realtime session", place)), "invalid_event")
        return await original(self, event)

    put(connection_class, REALTIME[2], handle_event)


def _patch_batches() -> None:
    # Why: `vllm run-batch` answers without routes, and requests for embeddings or scores are never sampled. Until: it
    # answers through the routes.
    for name in BATCHES:
        if (module := sys.modules.get(name)) is None:  # a server does not import it
            continue
        original = take(module, "run_request", ["serving_engine_func", "request"])
        if original is None:
            continue

        @functools.wraps(original)
        async def run_request(answer: Any, request: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            sampled = hasattr(request.body, "to_sampling_params")  # where it is admitted
            if not sampled and (place := doors.asking(dict(request.body))) is not None:
                error = doors.refusal_elsewhere(request.url, place)

                async def refused(body: Any) -> Any:
                    doors.refuse(error)

                answer = refused
            token = doors.exchange.set(doors.Exchange(request.url))  # so that an answer carries its receipt
            try:
                return await _original(answer, request, *args, **kwargs)
            finally:
                doors.exchange.reset(token)

        put(module, "run_request", run_request)
