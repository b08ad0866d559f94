"""Every change made to vLLM's servers: the request models and handlers behind each route that can be steered.

What a request says is read by `http.before_routes`, before its route. Lines of batches have no route: they are read
here. How a patch is put in, and what happens where it does not fit, is in `patches.patching`.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm.bad_request import refuse
from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.frontend.admission import FIELD
from trimtab.engines.vllm.frontend.body import Body
from trimtab.engines.vllm.patches.patching import Need, Patch, patch
from trimtab.errors import SteeringError

logger = logging.getLogger("vllm.trimtab")

PROTOCOLS = {  # module, class: the request models that vLLM turns into sampling parameters
    "vllm.entrypoints.openai.chat_completion.protocol": "ChatCompletionRequest",
    "vllm.entrypoints.openai.completion.protocol": "CompletionRequest",
    "vllm.entrypoints.openai.responses.protocol": "ResponsesRequest",
    "vllm.entrypoints.speech_to_text.transcription.protocol": "TranscriptionRequest",
    "vllm.entrypoints.speech_to_text.translation.protocol": "TranslationRequest",
}

RESPONSES = "vllm.entrypoints.openai.responses.serving"

TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.serving"

MESSAGES = "vllm.entrypoints.anthropic.serving"

RENDERER = "vllm.entrypoints.scale_out.render.serving"

BATCHES = {  # module: whether some versions have only another name for it there
    "vllm.entrypoints.launchers.run_batch": False,
    "vllm.entrypoints.openai.run_batch": True,
}

_REQUEST = ("self", "request", "raw_request")

LINE_PLACES = frozenset(f"body.{place}" for place in requests.PLACES)

_LINE = "_trimtab_line"  # where a line of a batch keeps what was read

TABLE: list[Patch] = []


def _patch_models(method: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function a row for a method of each request model."""

    def rows(make: Callable[..., Any]) -> Callable[..., Any]:
        for module, name in PROTOCOLS.items():
            need = Need.LIBRARIES if "speech" in module else Need.ALWAYS
            patch(module, f"{name}.{method}", "self", table=TABLE, need=need, **more)(make)
        return make

    return rows


def _patch_batches(target: str, *first: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function a row for a function of each module of batches."""

    def rows(make: Callable[..., Any]) -> Callable[..., Any]:
        for module, optional in BATCHES.items():
            more = {"optional": optional, "need": Need.BY_VERSION, "at_start": False}  # a server imports none
            patch(module, target, *first, table=TABLE, **more)(make)
        return make

    return rows


@_patch_models("to_sampling_params")
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


@_patch_models("to_beam_search_params", optional=True)
def _refuse_beams(original: Any) -> Any:
    """Why: a beam resubmits its own tokens as a prompt. Until: beam search keeps one request per beam."""

    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        requests.refuse_beam_search(requests.given_by(self))
        return original(self, *args, **kwargs)

    return to_beam_search_params


@patch(TOKENS, "ServingTokens.serve_tokens", *_REQUEST, table=TABLE, need=Need.BY_VERSION)
def _admit_tokens(original: Any) -> Any:
    """Why: this door takes sampling parameters as they are, and may stream. Until: vLLM validates sampling parameters
    before it answers a streaming request.
    """

    @functools.wraps(original)
    async def serve_tokens(self: Any, request: Any, raw_request: Any = None) -> Any:
        if (current := requests.exchange.get()) is not None and current.was_read:
            given = current.given
        else:
            given = (request.sampling_params.extra_args or {}).get(FIELD)
        request.sampling_params = requests.admit_http(request.sampling_params, given)
        return await original(self, request, raw_request)

    return serve_tokens


@patch(
    RESPONSES, "OpenAIServingResponses._generate_with_builtin_tools",
    "self", "request_id", "engine_input", "sampling_params", "context", table=TABLE,
)  # fmt: skip
def _place_responses(original: Any) -> Any:
    """Why: here the engine's client is called within a generator, which is iterated when the answer has begun; a prompt
    that has no place for what it is steered with is to be refused before. A later prompt of the same answer, behind a
    tool's call, is placed when it is known. Until: vLLM processes a request's inputs before it answers a streaming
    request.
    """

    @functools.wraps(original)
    def _generate_with_builtin_tools(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        requests.placed_params(self.engine_client.input_processor, given["engine_input"], given["sampling_params"])
        return original(self, *args, **kwargs)

    signature = inspect.signature(original)
    return _generate_with_builtin_tools


@patch(MESSAGES, "AnthropicServingMessages.create_messages", *_REQUEST, table=TABLE, need=Need.BY_VERSION)
@patch(RENDERER, "ServingRender.render_messages_request", *_REQUEST, table=TABLE, optional=True)  # not in 0.26
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


@_patch_batches("BatchRequestInput.model_validate_json", "json_data")
def _read_lines(original: Any) -> Any:
    """Why: `vllm run-batch` answers without routes, and its models keep the last of repeated keys. Until: it answers
    through the routes.
    """

    def model_validate_json(cls: Any, json_data: str | bytes, *args: Any, **kwargs: Any) -> Any:
        line = original(json_data, *args, **kwargs)
        line.__dict__[_LINE] = Body.read(json_data)
        return line

    return classmethod(model_validate_json)


@_patch_batches("run_request", "serving_engine_func", "request")
def _answer_lines(original: Any) -> Any:
    """Why: `vllm run-batch` answers without routes, and its requests for embeddings or scores are never sampled. Until:
    it answers through the routes.
    """

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
    refuse(error)


@patch("vllm.plugins", "load_endpoint_plugins", "supported_tasks", table=TABLE)
def _load_our_routes(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: vLLM attaches a plugin's routes only if VLLM_PLUGINS names it, because routes widen what a server exposes.
    A server started with steering on has been asked for them; one without it gets none, and refuses requests that ask
    for steering. Until: a plugin can be named by other means.
    """

    @functools.wraps(original)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> Any:
        theirs = logging.getLogger(original.__module__)
        theirs.addFilter(_leave_us_out)
        try:
            loaded = original(*args, **kwargs)
        finally:
            theirs.removeFilter(_leave_us_out)
        if any(plugin.name == "trimtab" for plugin in loaded):
            return loaded
        try:
            from trimtab.engines.vllm.http.routes import endpoint_plugin

            return [*loaded, endpoint_plugin()]
        except Exception as error:
            if requests.current_front_end() is not None:
                raise
            logger.warning("trimtab cannot guard this server's routes, which are those of plain vLLM: %r", error)
            return loaded

    return load_endpoint_plugins


def _leave_us_out(record: logging.LogRecord) -> bool:
    """A log filter: vLLM lists the endpoint plugins that it leaves out, and ours is loaded all the same."""
    if not isinstance(record.args, tuple):
        return True
    listed = next((names for names in record.args if isinstance(names, list) and "trimtab" in names), None)
    if listed is None:
        return True
    listed.remove("trimtab")
    return bool(listed)
