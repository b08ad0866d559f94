"""Every change made to vLLM's front end: flags, and the doors that all requests pass.

The doors of the HTTP server are in `patches.servers`; how a patch is put in, and what happens where it does not fit, in
`patches.patching`.
"""

import argparse
import functools
import logging
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm.frontend import requests
from trimtab.engines.vllm.frontend.accounts import ticket_in
from trimtab.engines.vllm.frontend.admission import FIELD, FrontEnd
from trimtab.engines.vllm.patches.patching import Need, Patch, install_table, note, patch, require_known
from trimtab.engines.vllm.patches.servers import HTTP_MODULES, install_http_doors
from trimtab.engines.vllm.settings.flags import add_flags, apply_flags, is_configured
from trimtab.errors import SteeringError
from trimtab.serving.registry import share_registry

logger = logging.getLogger("vllm.trimtab")

Build = Callable[[Any], FrontEnd | None]

TABLE: list[Patch] = []

FRONT_END_MODULES = {
    "vllm.v1.engine.input_processor": Need.ALWAYS,
    "vllm.v1.engine.output_processor": Need.ALWAYS,
    "vllm.entrypoints.llm": Need.ALWAYS,
    "vllm.plugins": Need.ALWAYS,
    **HTTP_MODULES,
}

_build: Build = lambda vllm_config: None  # noqa: E731 (until `install`)


def install(build: Build) -> None:
    """Patch the command line and the doors, each as soon as vLLM imports it.

    `build` makes the front end of a `VllmConfig`, None where steering is not configured.
    """
    global _build
    _build = build
    install_table(TABLE)
    install_http_doors()


# --- the command line


@patch("vllm.engine.arg_utils", "EngineArgs.add_cli_args", "parser", table=TABLE)
def _add_flags(original: Any) -> Any:
    """Why: vLLM has no hook for a plugin's own flags. The namespace is completed where it is parsed, so that every
    process it is handed to finds plain settings. Until: it has one.
    """

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        try:
            add_flags(parser)
        except Exception as error:  # a vLLM with flags of these names: without ours it parses as ever
            note(f"the flags cannot be added ({type(error).__name__}: {error})")
            return parser
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

    return staticmethod(add_cli_args)


def _front_end_processes(args: argparse.Namespace) -> int:
    # By default vLLM starts as many API servers as there are data-parallel ranks.
    return getattr(args, "api_server_count", None) or getattr(args, "data_parallel_size", None) or 1


# --- the doors


@patch("vllm.v1.engine.input_processor", "InputProcessor.__init__", "self", "vllm_config", table=TABLE)
def _make_the_front_end(original: Callable[..., None]) -> Callable[..., None]:
    """Why: it is made once per engine, in the process that admits requests. Until: a plugin is told of it."""

    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        front_end = None
        if is_configured(vllm_config):
            require_known()  # once more: the configuration may have been made in another process
            front_end = _build(vllm_config)
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
        requests.carry(request.sampling_params, steering)
        requests.mark(front_end, request.sampling_params)
        return request

    return process_inputs


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
        return result

    return add_request


@patch(
    "vllm.v1.engine.output_processor", "RequestState.make_request_output",
    "self", "new_token_ids", "pooling_output", "finish_reason", table=TABLE,
)  # fmt: skip
def _end_an_account(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: it knows how long a prompt was and how many tokens were answered, and makes what offline callers receive.
    Until: as above.
    """

    @functools.wraps(original)
    def make_request_output(
        self: Any, new_token_ids: Any, pooling_output: Any, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> Any:
        account = getattr(self, "_trimtab_account", None)
        if account is not None and finish_reason is not None:
            account.finished(self.prompt_len, self.detokenizer.num_output_tokens())
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
