"""Forward passes over a dummy batch, through the runner of a worker, for what is checked at its start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[int], Tensor]
"""Runs the model over so many tokens and returns what it did, as float32 [tokens, ...]."""


def dummy_forward(worker: Any, is_v2: bool, *, eager: bool = False) -> Forward:
    """Passes of a worker's model. `eager` ones replay no graph; compiled code runs unless it is turned off, too."""
    # As in the profile run, which comes before there are graphs. A rebalancing of experts is not for us to time.
    options = {"is_profile": True, "skip_eplb": True} if eager else {}
    return _forward_v2(worker.model_runner, options) if is_v2 else _forward_v1(worker.model_runner, options)


@contextmanager
def uncompiled(model: nn.Module, *, whole: bool = False) -> Iterator[None]:
    """Let the parts of `model` that vLLM compiles run as they are written; if `whole`, those that torch does, too."""
    parts: list[Any] = [module for module in model.modules() if getattr(module, "do_not_compile", None) is False]
    compiled = {module: module._compiled_call_impl for module in model.modules() if whole and _is_compiled(module)}
    try:
        for part in parts:
            part.do_not_compile = True
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for part in parts:
            part.do_not_compile = False
        for module, call in compiled.items():
            module._compiled_call_impl = call


def is_compiled_whole(model: nn.Module) -> bool:
    """Whether torch itself was asked to compile `model` (vLLM's mode 1)."""
    return any(map(_is_compiled, model.modules()))


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def _forward_v1(runner: Any, options: dict[str, bool]) -> Forward:
    def forward(tokens: int) -> Tensor:
        _clear_inputs(runner, runner.inputs_embeds.gpu)
        with _recorded(runner, "model") as results:
            # Without attention its result would be whatever the memory holds, which may drown a canary.
            last = runner._dummy_run(tokens, force_attention=True, **options)[0]
        return _stream(results[-1] if results else last, tokens)

    return forward


def _forward_v2(runner: Any, options: dict[str, bool]) -> Forward:
    def forward(tokens: int) -> Tensor:
        _clear_inputs(runner, _embeddings_v2(runner, tokens))
        with _recorded(runner, "execute_model") as results:
            try:
                last = runner._dummy_run(tokens, **options)[0]
            except Exception:
                runner.kv_connector.set_disabled(False)  # as it does itself at its end
                raise
        return _stream(results[-1] if last is None else last, tokens)

    return forward


def _clear_inputs(runner: Any, embeddings: Tensor | None) -> None:
    """Zero the buffers that a dummy run starts from: what an earlier pipeline stage would have sent, and `embeddings`.

    Layers that add in place have left the last run's stream there, canary and all: each run would begin where the one
    before it ended.
    """
    received = runner.intermediate_tensors
    inputs = [] if received is None else list(received.tensors.values())
    with torch.inference_mode():  # in which the runner may have made them
        for tensor in inputs if embeddings is None else [*inputs, embeddings]:
            tensor.zero_()


def _embeddings_v2(runner: Any, tokens: int) -> Tensor | None:
    """Where a dummy run takes embeddings from, if this model is given such in place of token ids."""
    given = getattr(runner, "uses_inputs_embeds", runner.supports_mm_inputs)  # newer versions have the first too
    found: Tensor | None = runner.model_state.dummy_inputs_embeds(tokens) if given and runner.is_first_pp_rank else None
    return found


class _Recorder:
    """Stands in for a callable and keeps what it returns; everything else is the callable's own."""

    def __init__(self, target: Any, results: list[Any]) -> None:
        self._target, self._results = target, results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._target(*args, **kwargs)
        self._results.append(result)
        return result


@contextmanager
def _recorded(owner: Any, name: str) -> Iterator[list[Any]]:
    results: list[Any] = []
    own = name in owner.__dict__
    target = getattr(owner, name)
    setattr(owner, name, _Recorder(target, results))
    try:
        yield results
    finally:
        if own:
            setattr(owner, name, target)
        else:
            delattr(owner, name)


def _stream(output: Any, tokens: int) -> Tensor:
    """What a model returned, as float32 [tokens, ...]: its hidden states, or all it sends to the next stage."""
    tensors = getattr(output, "tensors", None)
    if tensors is not None:
        parts = [tensors[name] for name in sorted(tensors)]
    else:
        parts = [output[0] if isinstance(output, (tuple, list)) else output]
    return torch.cat([part[:tokens].float().reshape(tokens, -1) for part in parts], dim=-1)
