"""The hook points of a whole model: which sites exist, where each is tapped, and why the others are refused."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument.conventions import LayerConvention, derive_convention
from trimtab.instrument.layer_replay import LayerProbe, evaluating, record_layer_calls, run_probe
from trimtab.instrument.layers import DecoderLayers, find_decoder_layers
from trimtab.instrument.stream import check_additions, check_places, check_stream
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

    Runs the model seven times over a few tokens, and one layer of each kind some twenty times; weights, buffers, hooks,
    training mode and random state are left as they were.
    Raises SteeringError, and nothing else, where the decoder layers cannot be found, do not form one residual stream,
    or cannot be run.
    """
    name = type(model).__name__
    try:
        return _map(model)
    except SteeringError as error:
        named = error.field != "model" or name in error.message
        raise SteeringError(error.field, error.message if named else f"{name}: {error.message}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise SteeringError(
            "model", f"{name} cannot be run over a few token ids to find its hook points: {reason}"
        ) from error


def _map(model: nn.Module) -> HookMap:
    decoder = find_decoder_layers(model)
    if any(weight.is_meta for weight in (*decoder.layers.parameters(), *_embedding(model).parameters())):
        raise SteeringError(
            "model", "its weights are on no device (offloaded, or not loaded): load them onto real ones"
        )
    with evaluating(model):
        layers = list(decoder)
        calls = record_layer_calls(layers, lambda: run_probe(model))
        check_stream(calls, decoder.hidden_size)
        kinds: dict[object, LayerConvention] = {}
        conventions = []
        for layer, call in zip(layers, calls, strict=True):
            kind = _kind(layer)
            if kind not in kinds:
                kinds[kind] = derive_convention(layer, LayerProbe(layer, call))
            conventions.append(kinds[kind])
        found = _hook_map(decoder, conventions)
        if amiss := check_places(model, layers, found.sites.sites, found.installed):
            reasons = [{site.hook: why for site, why in amiss.items() if site.layer == i} for i in range(len(layers))]
            found = _hook_map(decoder, [conv.without(why) for conv, why in zip(conventions, reasons, strict=True)])
        check_additions(model, layers, calls, found.sites.sites, found.installed)
    return found


def _hook_map(decoder: DecoderLayers, conventions: Sequence[LayerConvention]) -> HookMap:
    sites = frozenset(Site(layer, hook) for layer, conv in enumerate(conventions) for hook in conv.taps)
    return HookMap(decoder, tuple(conventions), ModelSites(decoder.hidden_size, len(decoder), sites))


def _embedding(model: nn.Module) -> nn.Module:
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return embedding


def _kind(layer: nn.Module) -> object:
    """Layers of one kind share a convention: same class, same modules under the same names."""
    return type(layer), tuple((name, type(child)) for name, child in layer.named_modules() if name.count(".") < 2)
