"""Every change made to vLLM's HTTP server: the request models and handlers behind each route that can be steered."""

import functools
from typing import Any

from trimtab.engines.vllm import doors
from trimtab.engines.vllm.compat_patching import find, put, take
from trimtab.engines.vllm.frontend import FIELD
from trimtab.errors import SteeringError

PROTOCOLS = {  # module, class: the request models that vLLM turns into sampling parameters
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
}

HANDLERS = {  # module: class, method: what answers those requests
    "vllm.entrypoints.openai.chat_completion.serving": ("OpenAIServingChat", "create_chat_completion"),
    "vllm.entrypoints.openai.completion.serving": ("OpenAIServingCompletion", "create_completion"),
    "vllm.entrypoints.openai.responses.serving": ("OpenAIServingResponses", "create_responses"),
}

TOKENS_HANDLER = ("vllm.entrypoints.scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens")

MESSAGES_HANDLER = ("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "create_messages")


def install_http_doors() -> None:
    """Patch what turns HTTP requests into work for the engine."""
    for module, name in PROTOCOLS.items():
        if (request_class := find(module, name)) is not None:
            _patch_protocol(request_class)
    for module, (name, method) in HANDLERS.items():
        if (handler_class := find(module, name)) is not None:
            _patch_handler(handler_class, method)
    _patch_tokens_handler()
    _patch_messages_handler()


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
        given = await _top_level(raw_request)
        inner = (request.sampling_params.extra_args or {}).get(FIELD)
        given = doors.one_of(given, inner, "sampling_params.extra_args")
        request.sampling_params = doors.admit_http(request.sampling_params, given)
        return await original(self, request, raw_request)

    put(handler_class, TOKENS_HANDLER[2], serve_tokens)


def _patch_messages_handler() -> None:
    # Why: its request model drops unknown fields too. It makes a chat request and hands that to the chat handler, to
    # which the spec is passed around it. Until: the model keeps them.
    if (handler_class := find(*MESSAGES_HANDLER[:2], required=False)) is None:
        return
    original = take(handler_class, MESSAGES_HANDLER[2], ["self", "request", "raw_request"])
    if original is None:
        return

    @functools.wraps(original)
    async def create_messages(self: Any, request: Any, raw_request: Any = None) -> Any:
        token = doors.forwarded.set(await _top_level(raw_request))
        try:
            return await original(self, request, raw_request)
        except SteeringError as error:  # raised, it is a 400 in newer versions and a 500 in 0.26; returned, in all
            return self.create_error_response(error)
        finally:
            doors.forwarded.reset(token)

    put(handler_class, MESSAGES_HANDLER[2], create_messages)


async def _top_level(raw_request: Any) -> Any:
    # The body is parsed already, and kept by the request.
    return None if raw_request is None else (await raw_request.json()).get(FIELD)
