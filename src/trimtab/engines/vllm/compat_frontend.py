"""Every change made to vLLM's front end: flags, the configuration, and the doors that all requests pass.

The doors of the HTTP server are in `compat_http`; how a patch is applied, and what happens where it does not fit, in
`compat_patching`. Nothing is imported from vLLM's server before an engine configuration is made, so worker processes,
which load plugins too, stay as light as they are.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm import compat_patching, doors
from trimtab.engines.vllm.accounts import ticket_in
from trimtab.engines.vllm.compat_http import install_http_doors
from trimtab.engines.vllm.compat_patching import put, take
from trimtab.engines.vllm.config import SteeringSettings
from trimtab.engines.vllm.flags import add_flags, apply_flags
from trimtab.engines.vllm.frontend import FIELD, FrontEnd
from trimtab.engines.vllm.registry import share_registry
from trimtab.errors import SteeringError


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
    original = take(engine_args, "add_cli_args", ["parser"])
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

    put(engine_args, "add_cli_args", staticmethod(add_cli_args))


def _front_end_processes(args: argparse.Namespace) -> int:
    # By default vLLM starts as many API servers as there are data-parallel ranks.
    return getattr(args, "api_server_count", None) or getattr(args, "data_parallel_size", None) or 1


def _patch_engine_config(engine_args: Any, build: Callable[[Any], FrontEnd | None]) -> None:
    # Why: the first point that each front-end process passes and no worker does. Until: a plugin is told where it runs.
    original = take(engine_args, "create_engine_config", ["self", "usage_context", "headless"])
    if original is None:
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        install_doors(build)
        if compat_patching.problems and SteeringSettings.of(config) is not None:
            raise SteeringError("steering", f"trimtab does not know this vLLM: {'; '.join(compat_patching.problems)}")
        return config

    put(engine_args, "create_engine_config", create_engine_config)


# --- the doors


def install_doors(build: Callable[[Any], FrontEnd | None]) -> None:
    """Patch what turns requests into work for the engine."""
    _patch_input_processor(build)
    _patch_output_processor()
    install_http_doors()
    _patch_offline_beam_search()
    _patch_endpoint_plugins()


def _patch_input_processor(build: Callable[[Any], FrontEnd | None]) -> None:
    # Why: every request of every door passes here, offline ones too; and it is made once per engine, in the process
    # that admits requests. Until: vLLM lets a plugin validate sampling parameters in the front end.
    from vllm.v1.engine.input_processor import InputProcessor

    init = take(InputProcessor, "__init__", ["self", "vllm_config"])
    if init is None:
        return

    @functools.wraps(init)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        self._trimtab_front_end = front_end = build(vllm_config)
        doors.set_current_front_end(front_end)
        init(self, vllm_config, *args, **kwargs)

    put(InputProcessor, "__init__", __init__)

    process = take(InputProcessor, "process_inputs", ["self", "request_id", "prompt", "params", "supported_tasks"])
    if process is None:
        return

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        resumable = bool(kwargs.get("resumable", False))
        params, steering = doors.admit_params(self._trimtab_front_end, params, resumable=resumable)
        request = process(self, request_id, prompt, params, *args, **kwargs)
        doors.carry(request.sampling_params, steering)
        return request

    put(InputProcessor, "process_inputs", process_inputs)


def _patch_output_processor() -> None:
    # Why: the one place that knows of each request, whatever door it came through, how long its prompt was and how many
    # tokens it answered with; receipts count them. Until: vLLM tells plugins of finished requests.
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    add = take(OutputProcessor, "add_request", ["self", "request", "prompt"])
    make = take(RequestState, "make_request_output", ["self", "new_token_ids", "pooling_output", "finish_reason"])
    if add is None or make is None:
        return

    @functools.wraps(add)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = add(self, request, *args, **kwargs)
        ticket = ticket_in(getattr(request.sampling_params, "extra_args", None))
        if ticket is not None:
            ticket.account.begun()
            self.request_states[request.request_id]._trimtab_account = ticket.account
        return result

    @functools.wraps(make)
    def make_request_output(
        self: Any, new_token_ids: Any, pooling_output: Any, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> Any:
        account = self._trimtab_account
        if account is not None and finish_reason is not None:
            account.finished(self.prompt_len, self.detokenizer.num_output_tokens())
        output = make(self, new_token_ids, pooling_output, finish_reason, *args, **kwargs)
        if account is not None and output is not None:
            setattr(output, FIELD, account.receipt)
        return output

    RequestState._trimtab_account = None
    put(OutputProcessor, "add_request", add_request)
    put(RequestState, "make_request_output", make_request_output)


def _patch_offline_beam_search() -> None:
    # Why: a beam resubmits its own tokens as a prompt, step by step: their phase would be wrong, and a default spec
    # would be merged into every step. Until: vLLM's beam search keeps one request per beam.
    from vllm import LLM

    original = take(LLM, "beam_search", ["self", "prompts", "params"])
    if original is None:
        return

    @functools.wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = getattr(self.llm_engine.input_processor, "_trimtab_front_end", None)
        if front_end is not None and front_end.default is not None:
            front_end.refuse("beam_search")
            raise SteeringError("beam_search", "cannot be steered, and this engine has a default spec for all requests")
        return original(self, *args, **kwargs)

    put(LLM, "beam_search", beam_search)


def _patch_endpoint_plugins() -> None:
    # Why: vLLM attaches a plugin's routes only if VLLM_PLUGINS names it, because routes widen what a server exposes. A
    # server started with steering on has been asked for them; one without it gets none, and refuses requests that ask
    # for steering. Until: a plugin can be named by other means.
    import vllm.plugins as plugins

    original = take(plugins, "load_endpoint_plugins", ["supported_tasks"])
    if original is None:
        return

    @functools.wraps(original)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        if all(plugin.name != "trimtab" for plugin in loaded):
            from trimtab.engines.vllm.routes import endpoint_plugin

            loaded.append(endpoint_plugin())
        return loaded

    put(plugins, "load_endpoint_plugins", load_endpoint_plugins)
