"""The refusal matrix: what is on vLLM's configuration, and what is said about it."""

from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.engines.vllm.settings.refusals import refusals, require_steerable
from trimtab.errors import SteeringError


def config(**changes: Any) -> Any:
    """A plain configuration with some nested attributes set: `parallel_config__use_ubatching=True`."""
    root: dict[str, dict[str, Any]] = {
        "model_config": {"runner_type": "generate", "is_encoder_decoder": False, "is_diffusion": False},
        "parallel_config": {
            "use_ubatching": False, "prefill_context_parallel_size": 1, "use_sequence_parallel_moe": False,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
        "compilation_config": {
            "pass_config": SimpleNamespace(), "dynamic_shapes_config": SimpleNamespace(type="backed"),
        },
        "offload_config": {
            "offload_backend": "auto", "uva": SimpleNamespace(cpu_offload_gb=0),
            "prefetch": SimpleNamespace(offload_group_size=0),
        },
    }  # fmt: skip
    for path, value in changes.items():
        section, _, name = path.partition("__")
        root.setdefault(section, {})[name] = value
    sections = {name: SimpleNamespace(**values) for name, values in root.items()}
    return SimpleNamespace(**{"speculative_config": None, "kv_transfer_config": None, **sections})


def test_a_plain_configuration_can_be_steered() -> None:
    assert refusals(config()) == []
    require_steerable(config())


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"model_config__runner_type": "pooling"}, "runner"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_config__is_diffusion": True}, "diffusion"),
        ({"parallel_config__use_ubatching": True}, "enable_dbo"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel_config__use_sequence_parallel_moe": True}, "enable_expert_parallel"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"compilation_config__pass_config": SimpleNamespace(enable_sp=True)}, "enable_sp"),
        ({"compilation_config__pass_config": SimpleNamespace(fuse_gemm_comms=True)}, "fuse_gemm_comms"),
        ({"compilation_config__dynamic_shapes_config": SimpleNamespace(type="unbacked")}, "dynamic_shapes_config"),
        ({"offload_config__uva": SimpleNamespace(cpu_offload_gb=4)}, "cpu_offload_gb"),
        ({"offload_config__prefetch": SimpleNamespace(offload_group_size=8)}, "offload_group_size"),
        ({"speculative_config__enable_adaptive_verification": True}, "enable_adaptive_verification"),
        ({"kv_transfer_config__kv_connector": "LMCacheConnectorV1"}, "kv_transfer_config"),
    ],
)
def test_a_mode_that_would_mis_steer_is_refused_with_its_remedy(changes: dict[str, Any], remedy: str) -> None:
    (reason,) = refusals(config(**changes))
    assert remedy in reason
    with pytest.raises(SteeringError, match="cannot be steered"):
        require_steerable(config(**changes))


def test_every_reason_is_given_at_once() -> None:
    changes = {"parallel_config__use_ubatching": True, "cache_config__kv_sharing_fast_prefill": True}
    assert len(refusals(config(**changes))) == 2


def test_connectors_that_find_kv_by_block_hash_are_served() -> None:
    assert refusals(config(kv_transfer_config__kv_connector="OffloadingConnector")) == []


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    (reason,) = refusals(config())
    assert "VLLM_USE_RUST_FRONTEND" in reason


@pytest.mark.vllm
def test_the_attributes_that_are_asked_for_exist_in_vllm() -> None:
    from dataclasses import fields

    from vllm.config import CacheConfig, ParallelConfig
    from vllm.config.compilation import DynamicShapesConfig
    from vllm.config.offload import OffloadConfig

    assert isinstance(ParallelConfig.use_ubatching, property)
    assert isinstance(ParallelConfig.use_sequence_parallel_moe, property)
    for owner, names in {
        ParallelConfig: {"prefill_context_parallel_size"},
        CacheConfig: {"kv_sharing_fast_prefill"},
        DynamicShapesConfig: {"type"},
        OffloadConfig: {"uva", "prefetch", "offload_backend"},
    }.items():
        assert names <= {field.name for field in fields(owner)}
