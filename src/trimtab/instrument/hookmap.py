"""The hook points of a whole model: which sites exist, where each is tapped, and why the others are refused."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument.conventions import LayerConvention, derive_convention
from trimtab.instrument.layers import DecoderLayers, find_decoder_layers
from trimtab.instrument.probe import LayerCall, LayerProbe, evaluating, record_layer_calls, run_probe
from trimtab.instrument.taps import Tap, Transform
from trimtab.sites import HookPoint, ModelSites, Site, site_order


@dataclass(frozen=True)
class HookMap:
    """`conventions[L]` is layer L's. `sites` is what can be steered and read."""

    decoder: DecoderLayers
    conventions: tuple[LayerConvention, ...]
    sites: ModelSites

    def tap(self, site: Site) -> Tap:
        """Where `site` is tapped in its layer. Raises SteeringError where the model has no such site."""
        reason = self.refusal(site)
        if reason is not None:
            raise SteeringError(str(site), reason)
        return self.conventions[site.layer].taps[site.hook]

    def refusal(self, site: Site) -> str | None:
        """Why this model has no such site; None where it has."""
        if not 0 <= site.layer < len(self.conventions):
            return f"layer {site.layer} does not exist: the model has layers 0 to {len(self.conventions) - 1}"
        return self.conventions[site.layer].refusals.get(site.hook)

    @property
    def refusals(self) -> dict[HookPoint, str]:
        """The hook points that no layer serves, each with the reason."""
        missing = [hook for hook in HookPoint if hook not in self.sites.hook_points]
        return {hook: self.conventions[0].refusals[hook] for hook in missing}

    @contextmanager
    def installed(self, transforms: Mapping[Site, Transform]) -> Iterator[None]:
        """Hook a transform onto each site while the context lasts; afterwards the modules are as they were."""
        with ExitStack() as stack:
            for site in sorted(transforms, key=site_order):  # hooks of one module run in the order they came
                handle = self.tap(site).install(self.decoder.layers[site.layer], transforms[site])
                stack.callback(handle.remove)
            yield


def map_hook_points(model: nn.Module) -> HookMap:
    """Find the decoder layers of a Transformers causal LM and prove each hook point by numbers.

    Runs the model twice over a few tokens, and one layer of each kind about ten times; weights, buffers, hooks,
    training mode and random state are left as they were.
    Raises SteeringError where the decoder layers cannot be found or do not form one residual stream.
    """
    decoder = find_decoder_layers(model)
    with evaluating(model):
        calls = record_layer_calls(model, list(decoder))
        _check_stream(decoder, calls)
        kinds: dict[object, LayerConvention] = {}
        conventions = []
        for layer, call in zip(decoder, calls, strict=True):
            kind = _kind(layer)
            if kind not in kinds:
                kinds[kind] = derive_convention(layer, LayerProbe(layer, call))
            conventions.append(kinds[kind])
        sites = frozenset(Site(layer, hook) for layer, conv in enumerate(conventions) for hook in conv.taps)
        found = HookMap(decoder, tuple(conventions), ModelSites(decoder.hidden_size, len(decoder), sites))
        _check_every_layer(model, found, torch.finfo(calls[0].entering.dtype).eps)
    return found


def _kind(layer: nn.Module) -> object:
    """Layers of one kind share a convention: same class, same modules under the same names."""
    return type(layer), tuple((name, type(child)) for name, child in layer.named_modules() if name.count(".") < 2)


def _check_stream(decoder: DecoderLayers, calls: list[LayerCall]) -> None:
    """Each layer must be given exactly what the layer before it returned, one hidden-sized vector per token."""
    for index, call in enumerate(calls):
        if call.entering.shape[-1] != decoder.hidden_size or call.entering.shape != call.leaving.shape:
            shape = tuple(call.entering.shape)
            raise SteeringError("model", f"layer {index} takes {shape}, not one {decoder.hidden_size}-wide stream")
        if index and not torch.equal(call.entering.cpu(), calls[index - 1].leaving.cpu()):
            raise SteeringError("model", f"layer {index} is not given what layer {index - 1} returns")


def _check_every_layer(model: nn.Module, found: HookMap, eps: float) -> None:
    """In every layer that has both: post_attn + mlp_out = post_block, in the model itself."""
    seen: dict[Site, torch.Tensor] = {}

    def reader(site: Site) -> Transform:
        def read(value: torch.Tensor) -> None:
            seen[site] = value.detach().double().reshape(-1, value.shape[-1]).clone()

        return read

    with found.installed({site: reader(site) for site in found.sites.sites}):
        run_probe(model)
    for layer, convention in enumerate(found.conventions):
        if {HookPoint.POST_ATTN, HookPoint.MLP_OUT} <= convention.taps.keys():
            stream, branch = seen[Site(layer, HookPoint.POST_ATTN)], seen[Site(layer, HookPoint.MLP_OUT)]
            leaving = seen[Site(layer, HookPoint.POST_BLOCK)]
            bound = 2 * eps * (stream.abs() + branch.abs() + leaving.abs())
            if not bool(((stream + branch - leaving).abs() <= bound).all()):
                raise SteeringError(
                    f"{HookPoint.POST_ATTN}:{layer}", "post_attn + mlp_out is not post_block in this layer"
                )
