"""Attach steering to a loaded model: allocate the tables, register them, and exchange the layers' classes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trimtab.engines.vllm.settings.config import SteeringSettings, model_sites
from trimtab.engines.vllm.settings.slots import slot_form
from trimtab.engines.vllm.settings.tables import stamped_tables
from trimtab.engines.vllm.worker.boundaries import LayerBoundary
from trimtab.engines.vllm.worker.conventions import attention_join, branch_taps, convention_of
from trimtab.engines.vllm.worker.layers import steered_branch_class, steered_join_class, steered_layer_class
from trimtab.engines.vllm.worker.unsteerable_layers import unsupported_reason
from trimtab.errors import SteeringError
from trimtab.instrument.layers import find_decoder_layers
from trimtab.ops import ROWS_ONLY, Emission, SteeringBuffers, set_emission
from trimtab.sites import HookPoint, Site, in_order

_LAYER_HOOKS = frozenset({HookPoint.PRE_ATTN, HookPoint.POST_BLOCK})


@dataclass(frozen=True)
class Attachment:
    """What was attached on this rank: the buffers of its own layers' sites."""

    buffers: SteeringBuffers
    modules: dict[Site, nn.Module]  # which module holds which site's buffers
    probe_sites: tuple[Site, ...]  # where gates' probes are read, in forward order
    layers: dict[int, LayerBoundary] = field(default_factory=dict)  # all decoder layers, steered or not


def attach(model: nn.Module, vllm_config: Any, settings: SteeringSettings, device: torch.device) -> Attachment:
    """Steer `model` in place, at the sites of `settings` whose layers this rank holds.

    To be called after the weights are loaded and before the first forward pass, which is when vLLM traces the model.
    Raises `SteeringError` where the layers cannot be found, cannot be steered, or lack a chosen hook point.
    """
    layers = _decoder_layers(model, vllm_config)
    wanted = model_sites(vllm_config, settings)
    held = {site: layers[site.layer] for site in wanted.sites if site.layer in layers}
    for layer in {site.layer for site in held}:
        _check(layers[layer], layer, settings, vllm_config.model_config.dtype)
    tables = stamped_tables(settings.stamp)
    buffers = SteeringBuffers(
        list(held),
        hidden_size=wanted.hidden_size,
        max_rows=tables.rows,
        max_tokens=_max_tokens(vllm_config),
        dtype=vllm_config.model_config.dtype,
        device=device,
        gates=wanted.gates.per_token,
        max_probes=tables.probes,
        probe_sites=wanted.gates.read_sites,
        row_monitor=wanted.gates.read_sites if settings.row_monitor else False,
        slots=slot_form(wanted.slots),
        slot_sites=wanted.slots.sites,
        span_requests=int(vllm_config.scheduler_config.max_num_seqs),
    )
    terms = ROWS_ONLY._replace(row_monitor=settings.row_monitor)  # at sites without its tensors it is in no graph
    mode = Emission(traced=settings.backend != "triton", terms=terms, eager=_runs_eagerly(vllm_config))
    boundaries = {index: LayerBoundary.of(layer) for index, layer in layers.items()}  # before classes are exchanged
    modules: dict[Site, nn.Module] = {}
    for index in sorted({site.layer for site in held}):
        hooks = {site.hook for site in held if site.layer == index}
        read = Site(index, HookPoint.POST_ATTN) in wanted.gates.read_sites | wanted.slots.sites
        for hook, module in _place(layers[index], hooks, reads_join=read).items():
            site = Site(index, hook)
            buffers.attach(module, site)
            modules[site] = module
    probe_sites = tuple(site for site in buffers.sites if site in wanted.gates.read_sites)
    for module in modules.values():
        set_emission(module, mode)
    return Attachment(buffers, modules, probe_sites, boundaries)


def _runs_eagerly(vllm_config: Any) -> bool:
    """Whether this engine neither compiles nor captures its model, so that Python runs in every forward pass."""
    compilation = vllm_config.compilation_config
    return all(getattr(choice, "name", choice) == "NONE" for choice in (compilation.mode, compilation.cudagraph_mode))


def _place(layer: nn.Module, hooks: set[HookPoint], *, reads_join: bool) -> dict[HookPoint, nn.Module]:
    """Exchange the classes of `layer` and of those of its children that `hooks` need; which module serves which.

    `post_attn` needs no whole stream to be added to, and is cheapest where the attention ends, behind `attn_out`; where
    something reads it (`reads_join`) it is at the norm that follows.
    """
    taps = branch_taps(type(layer))
    placed: dict[HookPoint, nn.Module] = {}
    if reads_join:
        join = layer.get_submodule(attention_join(type(layer)))
        join.__class__ = steered_join_class(type(join))
        placed[HookPoint.POST_ATTN] = join
    inner = in_order(hooks - _LAYER_HOOKS - placed.keys())
    for path in dict.fromkeys(taps[hook].path for hook in inner):
        own = [hook for hook in inner if taps[hook].path == path]
        entering = next((hook for hook in own if taps[hook].is_input), None)
        child = layer.get_submodule(path)
        child.__class__ = steered_branch_class(type(child), entering, tuple(hook for hook in own if hook != entering))
        placed.update(dict.fromkeys(own, child))
    if hooks & _LAYER_HOOKS:
        layer.__class__ = steered_layer_class(type(layer), convention_of(type(layer)))
        placed.update(dict.fromkeys(hooks & _LAYER_HOOKS, layer))
    return placed


def _decoder_layers(model: nn.Module, vllm_config: Any) -> dict[int, nn.Module]:
    """The decoder layers that this pipeline stage holds, by their number in the whole model."""
    language: Any = getattr(model, "get_language_model", None)
    root = language() if callable(language) else model
    found = find_decoder_layers(root, vllm_config.model_config.hf_text_config)
    return {i: layer for i, layer in enumerate(found) if type(layer).__name__ != "PPMissingLayer"}


def _check(layer: nn.Module, index: int, settings: SteeringSettings, dtype: torch.dtype) -> None:
    name = type(layer).__name__
    if (reason := unsupported_reason(layer, dtype)) is not None:
        raise SteeringError("model", f"layers of class {name} cannot be steered: {reason}")
    taps = branch_taps(type(layer))
    for hook in settings.hook_points:
        if hook not in _LAYER_HOOKS and hook not in taps:
            can = [h.value for h in HookPoint if h in _LAYER_HOOKS or h in taps]
            raise SteeringError(
                "steering.hook_points", f"layers of class {name} have no {hook.value}; they have {', '.join(can)}"
            )
    modules = {"": layer}
    paths = [taps[hook].path for hook in settings.hook_points if hook in taps]
    if HookPoint.POST_ATTN in settings.hook_points:
        paths.append(attention_join(type(layer)))
    modules |= {path: layer.get_submodule(path) for path in paths}
    for path, module in modules.items():
        if "forward" in module.__dict__:
            raise SteeringError(
                "model", f"{f'{path} of ' if path else ''}layer {index} ({name}) has a forward of its own, as weight "
                "offloading installs it; turn that off"
            )  # fmt: skip


def _max_tokens(vllm_config: Any) -> int:
    """Tokens of the longest forward pass: a full batch, or a padded graph, whichever is longer."""
    graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    longest = max(int(vllm_config.scheduler_config.max_num_batched_tokens), int(graph))
    return -(-longest // 64) * 64 + 64
