"""Where steering acts: hook points, sites and phases, with one meaning in every model family."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

LAYERS_BELOW = 10**9
"""No model has so many. A layer written in a request or a form stays below, so that it can be told in messages."""


class HookPoint(StrEnum):
    """A place in a decoder layer. The order here is the order in which a forward pass reaches them."""

    PRE_ATTN = "pre_attn"  # the residual stream entering the layer
    ATTN_OUT = "attn_out"  # the attention branch before its add
    POST_ATTN = "post_attn"  # the stream after the attention add
    MLP_IN = "mlp_in"  # the normed MLP input
    MLP_OUT = "mlp_out"  # the MLP branch before its add
    POST_BLOCK = "post_block"  # the stream leaving the layer: Transformers' hidden_states[layer + 1]


HOOK_ORDER = {hook: position for position, hook in enumerate(HookPoint)}


def in_order(hooks: Iterable[HookPoint]) -> tuple[HookPoint, ...]:
    """Hook points as a forward pass reaches them within a layer, each once."""
    return tuple(sorted(set(hooks), key=HOOK_ORDER.__getitem__))


class Site(NamedTuple):
    """One hook point of one layer; layers count from 0."""

    layer: int
    hook: HookPoint

    def __str__(self) -> str:
        return f"{self.hook.value}:{self.layer}"


def site_order(site: Site) -> tuple[int, int]:
    """Sort key that puts sites in the order of the forward pass."""
    return site.layer, HOOK_ORDER[site.hook]


class Phase(StrEnum):
    """Phase of a token, by its position alone: prefill while position < prompt length, decode from there on."""

    PREFILL = "prefill"
    DECODE = "decode"


class OwnGate(NamedTuple):
    """The monitor of an engine, as far as others must know it (see `trimtab.program.monitor`)."""

    digest: bytes
    site: Site


@dataclass(frozen=True)
class GateLimits:
    """Which gates an engine serves; by default none. Its monitor comes on top of what requests may ask for."""

    count: int = 0  # different gates that one phase of a request may have
    probe_sites: frozenset[Site] = frozenset()  # where the probe of a request's gate can be read
    stages: tuple[int, ...] = ()  # the first layer of each pipeline stage but the first
    monitor: OwnGate | None = None

    @property
    def per_token(self) -> int:
        """Different gates that one token may have."""
        return self.count + (self.monitor is not None)

    @property
    def read_sites(self) -> frozenset[Site]:
        """Where probes are read."""
        return self.probe_sites if self.monitor is None else self.probe_sites | {self.monitor.site}

    def stage(self, layer: int) -> int:
        """The pipeline stage that holds `layer`."""
        return sum(first <= layer for first in self.stages)


MOST_SLOTS_DECLARED = 16  # by a server, on one token at one site
MOST_SLOTS_EMBEDDED = 64  # there in the embedded engine: more than interventions of a spec, some of which take several
MOST_SLOTS_OF_PHASE = 128  # of a request at all its sites together; a monitor may split each in two


@dataclass(frozen=True)
class SlotLimits:
    """Which slots an engine serves; by default none."""

    count: int = 0  # slots that act on one token at one site
    sites: frozenset[Site] = frozenset()  # where slots can act: their graph reads the whole stream there
    kinds: frozenset[str] = frozenset()  # of intervention that were declared
    most: int = MOST_SLOTS_DECLARED  # what a setting could make of `count`; no more than it where there is none


class Room(NamedTuple):
    """What the tables of an engine hold at one time: so many different rows, and probes of gates; and whether gates
    are lowered, so that some need neither (see `trimtab.program.lowering`)."""

    rows: int
    probes: int
    lowers: bool = False


@dataclass(frozen=True)
class ModelSites:
    """What an engine can steer: the model's width and depth, the sites that its graph really reads, and its gates."""

    hidden_size: int
    num_layers: int
    sites: frozenset[Site]
    gates: GateLimits = GateLimits()
    room: Room | None = None  # None: for any request
    slots: SlotLimits = SlotLimits()

    @property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """The hook points served in at least one layer, in forward order."""
        present = {site.hook for site in self.sites}
        return tuple(hook for hook in HookPoint if hook in present)
