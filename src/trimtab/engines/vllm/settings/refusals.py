"""What cannot be steered correctly, as a pure function of vLLM's configuration.

Nothing here runs unsteered or mis-steered instead: each entry stops the engine at start and says what to turn off.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.errors import SteeringError

# Connectors that find KV by vLLM's own block hashes, in which steering is a part. Others key on tokens alone.
BLOCK_HASH_CONNECTORS = frozenset({"OffloadingConnector", "SimpleCPUOffloadConnector"})


class Rule(NamedTuple):
    """One mode that is refused: whether a configuration has it, and a sentence that says why and what to change."""

    applies: Callable[[Any], bool]
    sentence: str


def refusals(vllm_config: Any) -> list[str]:
    """Why this configuration cannot be steered: one sentence per reason, each with what to change. Empty: it can."""
    return [rule.sentence for rule in RULES if rule.applies(vllm_config)]


def require_steerable(vllm_config: Any) -> None:
    """Raise `SteeringError` with every reason for which this configuration cannot be steered."""
    if reasons := refusals(vllm_config):
        raise SteeringError(SETTINGS_KEY, "this engine cannot be steered: " + "; ".join(reasons))


def _get(root: Any, path: str, default: Any = None) -> Any:
    """A nested attribute; `default` where a vLLM release does not have it."""
    for name in path.split("."):
        root = getattr(root, name, None)
        if root is None:
            return default
    return root


def _truthy(path: str) -> Callable[[Any], bool]:
    return lambda config: bool(_get(config, path))


def _above(path: str, limit: float) -> Callable[[Any], bool]:
    return lambda config: (_get(config, path) or 0) > limit


def _foreign_connector(config: Any) -> bool:
    connector = _get(config, "kv_transfer_config.kv_connector")
    return connector is not None and connector not in BLOCK_HASH_CONNECTORS


def _offloads(config: Any) -> bool:
    return (
        (_get(config, "offload_config.uva.cpu_offload_gb") or 0) > 0
        or (_get(config, "offload_config.prefetch.offload_group_size") or 0) > 0
        or _get(config, "offload_config.offload_backend") in ("uva", "prefetch")
    )


def _unbacked_shapes(config: Any) -> bool:
    kind = _get(config, "compilation_config.dynamic_shapes_config.type")
    return str(getattr(kind, "value", kind)).lower() == "unbacked"


RULES: tuple[Rule, ...] = (
    Rule(
        lambda config: _get(config, "model_config.runner_type", "generate") != "generate",
        "only models that generate are steered: set runner to generate",
    ),
    Rule(_truthy("model_config.is_encoder_decoder"), "encoder-decoder models are not supported"),
    Rule(_truthy("model_config.is_diffusion"), "diffusion language models are not supported"),
    Rule(
        _truthy("parallel_config.use_ubatching"),
        "dual-batch overlap runs the model on halves of a batch: turn off enable_dbo and ubatch_size",
    ),
    Rule(
        _above("parallel_config.prefill_context_parallel_size", 1),
        "prefill context parallelism spreads a prompt's tokens: set prefill_context_parallel_size to 1",
    ),
    Rule(
        _truthy("parallel_config.use_sequence_parallel_moe"),
        "sequence-parallel MoE spreads tokens over ranks between layers: turn off enable_expert_parallel, or run with "
        "tensor_parallel_size 1",
    ),
    Rule(
        _truthy("cache_config.kv_sharing_fast_prefill"),
        "fast prefill skips tokens in later layers: turn off kv_sharing_fast_prefill",
    ),
    Rule(
        _truthy("compilation_config.pass_config.enable_sp"),
        "the sequence-parallel compile pass spreads tokens over ranks: set pass_config.enable_sp to false",
    ),
    Rule(
        _truthy("compilation_config.pass_config.fuse_gemm_comms"),
        "the async tensor-parallel pass spreads tokens over ranks: set pass_config.fuse_gemm_comms to false",
    ),
    Rule(_unbacked_shapes, "unbacked dynamic shapes are not supported: leave dynamic_shapes_config.type at backed"),
    Rule(_offloads, "weight offloading replaces the layers' forward: set cpu_offload_gb and offload_group_size to 0"),
    Rule(
        _truthy("speculative_config.enable_adaptive_verification"),
        "adaptive verification decides on the device which tokens a step holds: turn off enable_adaptive_verification",
    ),
    Rule(
        _foreign_connector,
        f"KV connectors other than {', '.join(sorted(BLOCK_HASH_CONNECTORS))} may share KV of differently steered "
        "prompts: leave out kv_transfer_config",
    ),
    Rule(
        lambda _: os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() in ("1", "true"),
        "the Rust front end ignores a request's steering: unset VLLM_USE_RUST_FRONTEND",
    ),
)
