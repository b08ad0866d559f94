"""Every change made to vLLM's front end: flags, request doors and HTTP plumbing.

Each patch says why it exists and until when, checks the signature of what it replaces, is marked on its target, and is
applied once. Where vLLM is not what a patch was written for, the patch is left out and noted: without steering vLLM
runs on, with steering it does not start. Nothing is imported from vLLM's server before an engine configuration is made,
so worker processes, which load plugins too, stay as light as they are.
"""

import argparse
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm import doors
from trimtab.engines.vllm.config import SteeringSettings
from trimtab.engines.vllm.flags import add_flags, apply_flags
from trimtab.engines.vllm.frontend import FIELD, FrontEnd
from trimtab.engines.vllm.registry import share_registry
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

_MARK = "__trimtab_patch__"


_problems: list[str] = []


def install(build: Callable[[Any], FrontEnd | None]) -> None:
    """Patch the command line now, and the request doors once an engine configuration is made.

    `build` makes the front end of a `VllmConfig`, None where steering is not configured. Does nothing in a process that
    makes no engine configuration: an engine core or a worker.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")  # it is what loads plugins in a front-end process
    if arg_utils is not None:
        _patch_flags(arg_utils.EngineArgs)
        _patch_engine_config(arg_utils.EngineArgs, build)


# --- the command line


def _patch_flags(engine_args: Any) -> None:
    # Why: vLLM has no hook for a plugin's own flags. Until: it has one.
    # The namespace is completed where it is parsed, so that every process it is handed to finds plain settings.
    original = _take(engine_args, "add_cli_args", ["parser"])
    if original is None:
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        parse = parser.parse_known_args

        def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
            parsed, rest = parse(args, namespace)
            try:
                if apply_flags(parsed):
                    share_registry(_front_end_processes(parsed))
            except SteeringError as error:
                parser.error(str(error))
            return parsed, rest

        parser.parse_known_args = parse_known_args
        return parser

    _put(engine_args, "add_cli_args", staticmethod(add_cli_args))


def _front_end_processes(args: argparse.Namespace) -> int:
    # By default vLLM starts as many API servers as there are data-parallel ranks.
    return getattr(args, "api_server_count", None) or getattr(args, "data_parallel_size", None) or 1


def _patch_engine_config(engine_args: Any, build: Callable[[Any], FrontEnd | None]) -> None:
    # Why: the first point that each front-end process passes and no worker does. Until: a plugin is told where it runs.
    original = _take(engine_args, "create_engine_config", ["self", "usage_context", "headless"])
    if original is None:
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        install_doors(build)
        if _problems and SteeringSettings.of(config) is not None:
            raise SteeringError("steering", f"trimtab does not know this vLLM: {'; '.join(_problems)}")
        return config

    _put(engine_args, "create_engine_config", create_engine_config)


# --- the doors


def install_doors(build: Callable[[Any], FrontEnd | None]) -> None:
    """Patch what turns requests into work for the engine."""
    _patch_input_processor(build)
    for module, name in PROTOCOLS.items():
        if (request_class := _find(module, name)) is not None:
            _patch_protocol(request_class)
    for module, (name, method) in HANDLERS.items():
        if (handler_class := _find(module, name)) is not None:
            _patch_handler(handler_class, method)
    _patch_tokens_handler()
    _patch_messages_handler()
    _patch_offline_beam_search()
    _patch_endpoint_plugins()


def _patch_input_processor(build: Callable[[Any], FrontEnd | None]) -> None:
    # Why: every request of every door passes here, offline ones too; and it is made once per engine, in the process
    # that admits requests. Until: vLLM lets a plugin validate sampling parameters in the front end.
    from vllm.v1.engine.input_processor import InputProcessor

    init = _take(InputProcessor, "__init__", ["self", "vllm_config"])
    if init is None:
        return

    @functools.wraps(init)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        self._trimtab_front_end = front_end = build(vllm_config)
        doors.set_current_front_end(front_end)
        init(self, vllm_config, *args, **kwargs)

    _put(InputProcessor, "__init__", __init__)

    process = _take(InputProcessor, "process_inputs", ["self", "request_id", "prompt", "params", "supported_tasks"])
    if process is None:
        return

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        resumable = bool(kwargs.get("resumable", False))
        params = doors.admit_params(self._trimtab_front_end, params, resumable=resumable)
        return process(self, request_id, prompt, params, *args, **kwargs)

    _put(InputProcessor, "process_inputs", process_inputs)


def _patch_protocol(request_class: Any) -> None:
    # Why: it runs before a stream is opened, so a refusal is an HTTP 400; `process_inputs` would be too late.
    # Until: vLLM validates sampling parameters before it answers a streaming request.
    original = _take(request_class, "to_sampling_params", ["self"])
    if original is None:
        return

    @functools.wraps(original)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = doors.given_by(self)  # before vLLM's own code, which shares and extends the vllm_xargs dictionary
        params = original(self, *args, **kwargs)
        return doors.admit_http(params, given)

    _put(request_class, "to_sampling_params", to_sampling_params)

    if not hasattr(request_class, "to_beam_search_params"):
        return
    beam = _take(request_class, "to_beam_search_params", ["self"])
    if beam is None:
        return

    @functools.wraps(beam)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        doors.refuse_beam_search(doors.given_by(self))
        return beam(self, *args, **kwargs)

    _put(request_class, "to_beam_search_params", to_beam_search_params)


def _patch_handler(handler_class: Any, method: str) -> None:
    # Why: the response models take extra fields, but nothing lets a plugin fill one. Until: something does.
    original = _take(handler_class, method, ["self", "request"])
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

    _put(handler_class, method, handle)


def _patch_tokens_handler() -> None:
    # Why: this door takes sampling parameters as they are, may stream, and its request model drops unknown fields, so a
    # top-level "steering" would be ignored without a word. Until: as for `to_sampling_params`.
    if (handler_class := _find(*TOKENS_HANDLER[:2], required=False)) is None:
        return
    original = _take(handler_class, TOKENS_HANDLER[2], ["self", "request", "raw_request"])
    if original is None:
        return

    @functools.wraps(original)
    async def serve_tokens(self: Any, request: Any, raw_request: Any = None) -> Any:
        given = await _top_level(raw_request)
        inner = (request.sampling_params.extra_args or {}).get(FIELD)
        given = doors.one_of(given, inner, "sampling_params.extra_args")
        request.sampling_params = doors.admit_http(request.sampling_params, given)
        return await original(self, request, raw_request)

    _put(handler_class, TOKENS_HANDLER[2], serve_tokens)


def _patch_messages_handler() -> None:
    # Why: its request model drops unknown fields too. It makes a chat request and hands that to the chat handler, to
    # which the spec is passed around it. Until: the model keeps them.
    if (handler_class := _find(*MESSAGES_HANDLER[:2], required=False)) is None:
        return
    original = _take(handler_class, MESSAGES_HANDLER[2], ["self", "request", "raw_request"])
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

    _put(handler_class, MESSAGES_HANDLER[2], create_messages)


async def _top_level(raw_request: Any) -> Any:
    # The body is parsed already, and kept by the request.
    return None if raw_request is None else (await raw_request.json()).get(FIELD)


def _patch_offline_beam_search() -> None:
    # Why: a beam resubmits its own tokens as a prompt, step by step: their phase would be wrong, and a default spec
    # would be merged into every step. Until: vLLM's beam search keeps one request per beam.
    from vllm import LLM

    original = _take(LLM, "beam_search", ["self", "prompts", "params"])
    if original is None:
        return

    @functools.wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = getattr(self.llm_engine.input_processor, "_trimtab_front_end", None)
        if front_end is not None and front_end.default is not None:
            front_end.refuse("beam_search")
            raise SteeringError("beam_search", "cannot be steered, and this engine has a default spec for all requests")
        return original(self, *args, **kwargs)

    _put(LLM, "beam_search", beam_search)


def _patch_endpoint_plugins() -> None:
    # Why: vLLM attaches a plugin's routes only if VLLM_PLUGINS names it, because routes widen what a server exposes. A
    # server started with steering on has been asked for them. Until: a plugin can be named by other means.
    import vllm.plugins as plugins

    original = _take(plugins, "load_endpoint_plugins", ["supported_tasks"])
    if original is None:
        return

    @functools.wraps(original)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        if doors.current_front_end() is not None and all(plugin.name != "trimtab" for plugin in loaded):
            from trimtab.engines.vllm.routes import endpoint_plugin

            loaded.append(endpoint_plugin())
        return loaded

    _put(plugins, "load_endpoint_plugins", load_endpoint_plugins)


# --- patching


def _find(module: str, name: str, *, required: bool = True) -> Any:
    """A class of vLLM; None if this version has none, which is noted if every version known to us has it."""
    try:
        found = getattr(importlib.import_module(module), name, None)
        problem = f"{module}.{name} is gone"
    except ModuleNotFoundError as error:
        found, problem = None, f"{module} cannot be imported: {error}"
    if found is None and required and problem not in _problems:
        _problems.append(problem)
    return found


def _take(owner: Any, name: str, first: list[str]) -> Any:
    """`owner.name` if it is to be replaced: None if it is ours already, or takes other parameters, which is noted."""
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return None
    where = f"{owner.__name__}.{name}"
    found = None if original is None else list(inspect.signature(original).parameters)
    if found is None or found[: len(first)] != first:
        problem = f"{where} is gone" if found is None else f"{where} takes {found}, not {first}, ..."
        if problem not in _problems:
            _problems.append(problem)
        return None
    return original


def _put(owner: Any, name: str, replacement: Any) -> None:
    setattr(getattr(replacement, "__func__", replacement), _MARK, True)
    setattr(owner, name, replacement)
