"""Layers that hand on something other than one stream at full size are refused, each with its true reason."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.engines.vllm.worker.attach import _check
from trimtab.engines.vllm.worker.unsteerable_layers import unsupported_reason
from trimtab.errors import SteeringError

vllm = pytest.importorskip("vllm", reason="reads the source of vLLM's own layers")

MODELS = "vllm.model_executor.models."
SCALED_IN_HALF = ["deepseek_v2.DeepseekV2DecoderLayer", "AXK1.AXK1DecoderLayer", "openpangu.OpenPanguDecoderLayer"]
STEERED = [
    "llama.LlamaDecoderLayer",
    "granite.GraniteDecoderLayer",
    "minicpm.MiniCPMDecoderLayer",
    "qwen3_next.Qwen3NextDecoderLayer",
    "mistral.MistralDecoderLayer",
]


def instance(path: str, **attributes: Any) -> nn.Module:
    """A layer of one of vLLM's classes, without weights."""
    module, name = path.rsplit(".", 1)
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"vLLM {vllm.__version__} has no {path}")
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    for key, value in attributes.items():
        setattr(layer, key, value)
    return layer


def made(package: str, name: str, **attributes: Any) -> nn.Module:
    layer = type(name, (nn.Module,), {"__module__": f"vllm.models.{package}.nvidia.model"})()
    for key, value in attributes.items():
        setattr(layer, key, value)
    return layer


@pytest.mark.parametrize("path", SCALED_IN_HALF)
def test_a_stream_that_is_scaled_in_float16_is_refused_there_and_there_alone(path: str) -> None:
    layer = instance(MODELS + path, routed_scaling_factor=2.5)
    reason = unsupported_reason(layer, torch.float16) or ""
    assert "in float16 it scales the residual stream (by routed_scaling_factor = 2.5): run it in bfloat16" in reason
    assert unsupported_reason(layer, torch.bfloat16) is None
    assert unsupported_reason(instance(MODELS + path, routed_scaling_factor=1.0), torch.float16) is None


def test_an_engine_with_such_layers_does_not_attach() -> None:
    layer = instance(MODELS + SCALED_IN_HALF[0], routed_scaling_factor=2.5)
    with pytest.raises(SteeringError, match=r"DeepseekV2DecoderLayer cannot be steered: in float16 it scales"):
        _check(layer, 0, SimpleNamespace(hook_points=()), torch.float16)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", STEERED)
def test_layers_that_scale_their_branches_alone_are_steered(path: str) -> None:
    assert unsupported_reason(instance(MODELS + path), torch.float16) is None


class AlwaysScaled(nn.Module):
    def forward(self, hidden_states: Any, residual: Any) -> Any:
        hidden_states, residual = self.norm(hidden_states, residual)
        residual = residual * 0.5
        return self.mlp(hidden_states), residual


def test_a_scale_in_any_precision_is_found() -> None:
    reason = unsupported_reason(AlwaysScaled(), torch.bfloat16) or ""
    assert "in bfloat16 it scales the residual stream (by residual * 0.5)" in reason


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (made("deepseek_v4", "DeepseekV4DecoderLayer"), "several residual streams"),
        (made("deepseek_v32", "DeepseekV32DecoderLayer"), "before the ranks' parts are summed"),
        (made("hy_v4", "HYV4DecoderLayer", enable_ihc=True), "several residual streams"),
        (made("hy_v4", "HYV4DecoderLayer", enable_ihc=False), "not tested"),
        (made("inkling", "InklingDecoderLayer"), "normed already"),
        (made("brand_new", "NewLayer"), "what layers of vllm.models.brand_new hand on is not known"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_layer_that_was_read_by_hand_is_refused_with_its_own_reason(layer: nn.Module, reason: str) -> None:
    assert reason in (unsupported_reason(layer, torch.bfloat16) or "")


def test_every_package_that_this_vllm_has_was_read() -> None:
    from pathlib import Path

    from trimtab.engines.vllm.worker import unsteerable_layers as streams

    root = Path(vllm.__file__).parent / "models"
    packages = {path.parent.name for path in root.glob("*/__init__.py")} if root.exists() else set()
    assert packages - {"common", "hy_v4"} <= streams._PACKAGES.keys()


def test_gemma_3n_is_refused_for_its_streams() -> None:
    reason = unsupported_reason(instance(MODELS + "gemma3n.Gemma3nDecoderLayer"), torch.bfloat16)
    assert "several residual streams" in (reason or "")


def test_gemma_4_is_refused_for_the_scale_at_its_end() -> None:
    reason = unsupported_reason(instance(MODELS + "gemma4.Gemma4DecoderLayer"), torch.bfloat16)
    assert "scales the whole stream at its end" in (reason or "")


def test_layers_that_run_in_a_loop_are_refused() -> None:
    reason = unsupported_reason(instance(MODELS + "iquest_loopcoder.LoopCoderDecoderLayer"), torch.bfloat16)
    assert "runs all layers in a loop" in (reason or "")
