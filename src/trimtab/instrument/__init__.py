"""Find decoder layers by structure, and give each hook point one meaning in every model family."""

from trimtab.instrument.conventions import LayerConvention
from trimtab.instrument.hookmap import HookMap, map_hook_points
from trimtab.instrument.layers import DecoderLayers, find_decoder_layers
from trimtab.instrument.taps import Tap

__all__ = ["DecoderLayers", "HookMap", "LayerConvention", "Tap", "find_decoder_layers", "map_hook_points"]
