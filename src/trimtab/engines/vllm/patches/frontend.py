"""Every change made to vLLM's front end: what all requests pass, through whatever door they come.

The doors of the HTTP server are in `patches.http`; how a patch is put in, and what happens where it does not fit, in
`patches.patching`.
"""

import functools
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.frontend.accounts import ticket_in
from trimtab.engines.vllm.frontend.admission import FIELD
from trimtab.engines.vllm.frontend.prompts import with_chats
from trimtab.engines.vllm.patches.patching import Patch, patch, require_known
from trimtab.engines.vllm.settings.flags import is_configured
from trimtab.errors import SteeringError

TABLE: list[Patch] = []


@patch("vllm.v1.engine.input_processor", "InputProcessor.__init__", "self", "vllm_config", table=TABLE)
def _make_the_front_end(original: Callable[..., None]) -> Callable[..., None]:
    """Why: it is made once per engine, in the process that admits requests. Until: a plugin is told of it."""

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        front_end = None
        if is_configured(vllm_config):
            from trimtab.engines.vllm.frontend.build import build_front_end

            require_known()  # once more: the configuration may have been made in another process
            front_end = build_front_end(vllm_config)
        self._trimtab_front_end = front_end
        requests.set_current_front_end(front_end)
        original(self, vllm_config, *args, **kwargs)

    return __init__


@patch(
    "vllm.v1.engine.input_processor", "InputProcessor.process_inputs",
    "self", "request_id", "prompt", "params", "supported_tasks", table=TABLE,
)  # fmt: skip
def _admit_each_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: every request of every door passes here, offline ones too. Until: vLLM lets a plugin validate sampling
    parameters in the front end.
    """

    @functools.wraps(original)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        resumable = bool(kwargs.get("resumable", False))
        front_end = getattr(self, "_trimtab_front_end", None)
        params, steering = requests.admit_params(front_end, params, resumable=resumable)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        steering = requests.place(self, prompt, request.prompt_token_ids, request.prompt_embeds, steering)
        requests.carry(request.sampling_params, steering)
        requests.mark(front_end, request.sampling_params)
        return request

    return process_inputs


@patch("vllm.v1.engine.async_llm", "AsyncLLM.generate", "self", "prompt", "sampling_params", "request_id", table=TABLE)
def _place_before_the_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: what says where it acts is refused where a prompt has no such place. A server's handler calls this with the
    rendered prompt before it answers, and a generator does nothing before it is iterated, which is too late for an HTTP
    400. Until: vLLM processes a request's inputs before it answers a streaming request.
    """

    @functools.wraps(original)
    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: Any, *args: Any, **kwargs: Any) -> Any:
        params = requests.placed_params(self.input_processor, prompt, sampling_params)
        return original(self, prompt, params, request_id, *args, **kwargs)

    return generate


_RENDERED = ("self", "conversations", "chat_params")


@patch("vllm.renderers.base", "BaseRenderer.render_chat", *_RENDERED, table=TABLE)
def _keep_the_messages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: a role's messages are found in the rendered prompt by what they say, and behind the renderer a prompt is
    token ids. Until: rendered prompts say which tokens are of which message.
    """

    @functools.wraps(original)
    def render_chat(self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = original(self, conversations, chat_params, *args, **kwargs)
        if requests.current_front_end() is not None:
            with_chats(self, chat_params, *reversed(rendered))
        return rendered

    return render_chat


@patch("vllm.renderers.base", "BaseRenderer.render_chat_async", *_RENDERED, table=TABLE)
def _keep_the_messages_of_servers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: as above; servers render with this one. Until: rendered prompts say which tokens are of which message."""

    @functools.wraps(original)
    async def render_chat_async(self: Any, conversations: Any, chat_params: Any, *args: Any, **kwargs: Any) -> Any:
        rendered = await original(self, conversations, chat_params, *args, **kwargs)
        if requests.current_front_end() is not None:
            with_chats(self, chat_params, *reversed(rendered))
        return rendered

    return render_chat_async


@patch("vllm.v1.engine.output_processor", "OutputProcessor.add_request", "self", "request", "prompt", table=TABLE)
def _begin_an_account(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: the one place that knows of each request, whatever door it came through; receipts count its tokens. Until:
    vLLM tells plugins of requests that begin and finish.
    """

    @functools.wraps(original)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, request, *args, **kwargs)
        ticket = ticket_in(getattr(request.sampling_params, "extra_args", None))
        if ticket is not None:
            ticket.account.begun()
            self.request_states[request.request_id]._trimtab_account = ticket.account
            self.request_states[request.request_id]._trimtab_carried = request.sampling_params.extra_args[FIELD]
        return result

    return add_request


@patch(
    "vllm.v1.engine.output_processor", "RequestState.make_request_output",
    "self", "new_token_ids", "pooling_output", "finish_reason", table=TABLE,
)  # fmt: skip
def _end_an_account(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: it knows how long a prompt was and how many tokens were answered, and makes what offline callers receive.
    Until: vLLM tells plugins of requests that begin and finish.
    """

    @functools.wraps(original)
    def make_request_output(
        self: Any, new_token_ids: Any, pooling_output: Any, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> Any:
        account = getattr(self, "_trimtab_account", None)
        if account is not None and finish_reason is not None:
            answer = self.detokenizer.output_token_ids
            account.finished(self._trimtab_carried, self.prompt_len, answer, self.prompt_token_ids)
        output = original(self, new_token_ids, pooling_output, finish_reason, *args, **kwargs)
        if account is not None and output is not None:
            setattr(output, FIELD, account.receipt)
        return output

    return make_request_output


@patch("vllm.entrypoints.llm", "LLM.beam_search", "self", "prompts", "params", table=TABLE)
def _refuse_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: a beam resubmits its own tokens as a prompt, step by step: their phase would be wrong, and a default spec
    would be merged into every step. Until: vLLM's beam search keeps one request per beam.
    """

    @functools.wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = getattr(self.llm_engine.input_processor, "_trimtab_front_end", None)
        if front_end is not None and front_end.default is not None:
            front_end.refuse("beam_search")
            raise SteeringError("beam_search", "cannot be steered, and this engine has a default spec for all requests")
        return original(self, *args, **kwargs)

    return beam_search
