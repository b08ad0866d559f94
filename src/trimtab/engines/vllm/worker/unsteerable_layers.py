"""Why a decoder layer of vLLM hands on something other than one residual stream at its full size, or runs repeatedly.

What can be read from the layer is read: a `forward` that multiplies the residual it passes on. The layers that vLLM
keeps under `vllm.models`, and few others, were read by hand, and are refused by package or class with what was found.
A package that nobody has read is refused, too. A scale that no source shows is measured at start (`row_sizes`), and
how often layers run is counted (`single_runs`).
"""

import ast
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trimtab.engines.vllm.worker.conventions import Convention, convention_of, forward_source

_SEVERAL = "it carries several residual streams for each token, none of which is the model's"
_PARTIAL = (
    "under tensor parallelism it hands on its MLP's output before the ranks' parts are summed, and its first layer is "
    "given an input that was normed already"
)
_EARLY = "it hands on an input of the next layer that was normed already, which an addition would miss"
_LOOPED = "its model runs all layers in a loop, and what is added once would be added in each run"

_PACKAGES = {  # below `vllm.models`
    "deepseek_v32": _PARTIAL,
    "dots3_note": _PARTIAL,
    "deepseek_v4": _SEVERAL,
    "deepseek_v41": _SEVERAL,
    "qwen4_exp": _SEVERAL,
    "glm5next": "it carries several residual streams for each token, or one beside three other tensors",
    "inkling": _EARLY,
    "muse_spark": "it rescales the stream at every boundary, by channel, in the layer that follows",
    "beam": _EARLY,
    "kimi_k3": "its residual stands behind another tensor, and some steps go around its layers",
    "minimax_m3": "it may hand on its MLP's output before the ranks' parts are summed, or go around its layers",
    "flint": "small batches go around its modules",
    "step5": "its residual may be of another precision than its hidden states",
}

_CLASSES = {
    "Gemma3nDecoderLayer": _SEVERAL,
    "Gemma4DecoderLayer": "it scales the whole stream at its end, and no test has shown yet that it is steered in full",
    "OuroDecoderLayer": _LOOPED,  # `total_ut_steps` times, 4 by default, with a norm between
    "LoopCoderDecoderLayer": _LOOPED,  # of IQuest-Coder: `loop_num` times, 2 by default, with nothing between
}


def unsupported_reason(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Why `layer` of a model in `dtype` cannot be steered; None where it can."""
    kinds = [kind for kind in type(layer).__mro__ if issubclass(kind, nn.Module)]
    if (named := next((_CLASSES[kind.__name__] for kind in kinds if kind.__name__ in _CLASSES), None)) is not None:
        return named
    root, _, rest = type(layer).__module__.partition("vllm.models.")
    if not root and rest:
        return _read_by_hand(layer, rest.split(".")[0])
    return _scaled(layer, dtype)


def _read_by_hand(layer: nn.Module, package: str) -> str:
    if package == "hy_v4":
        if getattr(layer, "enable_ihc", True):
            return _SEVERAL
        return "without hyper-connections it is not tested"
    return _PACKAGES.get(package, f"what layers of vllm.models.{package} hand on is not known")


def _scaled(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """A layer that multiplies the residual which it hands on, be it in float16 alone, to keep it in range."""
    function = forward_source(type(layer))
    if function is None or convention_of(type(layer)) is not Convention.SPLIT:
        return None  # a layer that makes one whole stream has scaled it before the addition comes
    for statement in _scalings(function):
        factors = [name for name in _own_attributes(statement.value) if isinstance(getattr(layer, name, None), float)]
        if factors and all(getattr(layer, name) == 1.0 for name in factors):
            continue
        in_half_only = any(isinstance(node, ast.Attribute) and node.attr == "float16" for node in ast.walk(function))
        if in_half_only and dtype != torch.float16:
            continue
        by = ", ".join(f"{name} = {getattr(layer, name):g}" for name in factors) or ast.unparse(statement.value)
        remedy = ": run it in bfloat16" if in_half_only else ""
        return f"in {str(dtype).removeprefix('torch.')} it scales the residual stream (by {by}){remedy}"
    return None


def _scalings(function: ast.FunctionDef) -> Iterator[ast.AugAssign | ast.Assign]:
    """The statements that multiply or divide `residual` in place, or make it of itself so."""
    for node in ast.walk(function):
        if isinstance(node, ast.AugAssign) and _is_residual(node.target):
            if isinstance(node.op, (ast.Mult, ast.Div)):
                yield node
        elif isinstance(node, ast.Assign) and any(map(_is_residual, node.targets)):
            product = isinstance(node.value, ast.BinOp) and isinstance(node.value.op, (ast.Mult, ast.Div))
            if product and any(map(_is_residual, ast.walk(node.value))):
                yield node


def _is_residual(node: Any) -> bool:
    return isinstance(node, ast.Name) and node.id == "residual"


def _own_attributes(value: ast.expr) -> list[str]:
    nodes = [node for node in ast.walk(value) if isinstance(node, ast.Attribute)]
    return [node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"]
