"""Every change made where vLLM's configuration comes from: the command line, and the arguments of an engine.

How a patch is put in, and what happens where vLLM is not what it was written for, is in `patches.patching`.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from trimtab.engines.vllm.patches.patching import Patch, note, patch, put_on
from trimtab.engines.vllm.patches.supported import require_supported
from trimtab.engines.vllm.settings.flags import add_flags, apply_flags, is_configured
from trimtab.errors import SteeringError
from trimtab.serving.registry import share_registry

TABLE: list[Patch] = []

PARSER: list[Patch] = []  # put on each parser that has our flags


@patch("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "self", "usage_context", "headless", table=TABLE)
def _check_the_configuration(original: Callable[..., Any]) -> Callable[..., Any]:
    """Why: the one place where a configuration is complete and not yet in use, in every way of starting vLLM. It is
    checked, and stamped so that compile artifacts of other settings are never loaded: vLLM looks them up before it
    traces the model, by a key that holds additional_config but not our classes.
    Until: vLLM lets a plugin take part in the configuration and in the key of the compile cache.
    """

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        if is_configured(vllm_config):
            from trimtab.engines.vllm.settings.stamp import prepare_config

            require_supported()
            prepare_config(vllm_config)
        return vllm_config

    return create_engine_config


@patch("vllm.engine.arg_utils", "EngineArgs.add_cli_args", "parser", table=TABLE)
def _add_flags(original: Callable[..., Any]) -> Any:
    """Why: vLLM has no hook for a plugin's own flags. Until: vLLM has one."""

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        try:
            add_flags(parser)
            put_on(parser, PARSER, parser)
        except Exception as error:  # a vLLM with flags of these names: without ours it parses as ever
            note(f"the flags cannot be added ({type(error).__name__}: {error})")
        return parser

    return staticmethod(add_cli_args)


@patch(
    "vllm.utils.argparse_utils", "FlexibleArgumentParser.parse_known_args", "self", "args", "namespace",
    table=PARSER, on="each parser with our flags", at_start=False,
)  # fmt: skip
def _move_flags(original: Callable[..., Any], parser: Any) -> Callable[..., Any]:
    """Why: the namespace is completed where it is parsed, so that every process it is handed to finds plain settings.
    Until: vLLM has a hook for a plugin's own flags.
    """

    def parse_known_args(args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        parsed, rest = original(args, namespace)
        try:
            if apply_flags(parsed):
                share_registry(_front_end_processes(parsed))
        except SteeringError as error:
            parser.error(str(error))
        return parsed, rest

    return parse_known_args


def _front_end_processes(args: argparse.Namespace) -> int:
    # By default vLLM starts as many API servers as there are data-parallel ranks.
    return getattr(args, "api_server_count", None) or getattr(args, "data_parallel_size", None) or 1
