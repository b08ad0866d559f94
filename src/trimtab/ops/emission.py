"""How a steered module emits: what is decided before it is first traced, and constant from then on."""

from typing import NamedTuple

from torch import nn

from trimtab.ops.gather import teach_inductor
from trimtab.ops.reference import ALL_TERMS, Terms
from trimtab.sites import HookPoint


class Emission(NamedTuple):
    """How a module's hook points steer; a constant while a model is traced. Set with `set_emission`."""

    traced: bool = False  # the reference's math inside a compiled graph, instead of the opaque operator
    terms: Terms = ALL_TERMS  # what the traced form computes
    cross_layer: bool = False  # a site's probe gates that site and everything after it, instead of that site alone
    monitor_at: HookPoint | None = None  # the one hook point that evaluates its probe for that; None is every one
    eager: bool = False  # no pass is compiled or captured, so the host decides in each whether a site rests


def set_emission(module: nn.Module, mode: Emission) -> None:
    """Choose how `module` steers. To be called before the module is first traced."""
    if mode.traced:
        teach_inductor()
    module._steering_emission = mode  # type: ignore[assignment]


def emission(module: nn.Module) -> Emission:
    """How `module` steers: what `set_emission` said, else the defaults."""
    mode: Emission = getattr(module, "_steering_emission", _DEFAULT_EMISSION)
    return mode


_DEFAULT_EMISSION = Emission()
