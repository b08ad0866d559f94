"""All device state of an engine: each site's tensors are views of stacked ones, and per-token values lie in one slab.

So a host writes a step with one copy, and a row at all sites with one scatter.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from trimtab.ops.args import SlotForm
from trimtab.ops.gate_buffers import GateBuffers
from trimtab.ops.host import SiteState, set_site_state
from trimtab.ops.site_buffers import (
    MONITOR_OFF,
    TOKEN_BYTES,
    aligned,
    buffer_name,
    row_monitor_dummies,
    row_params,
    token_views,
)
from trimtab.ops.slot_buffers import SlotBuffers
from trimtab.ops.span_buffers import SpanBuffers
from trimtab.sites import Site, site_order


class SteeringBuffers:
    """All device state of one engine: S sites, R rows, T tokens, hidden size H."""

    sites: tuple[Site, ...]  # in forward order
    row_monitor_sites: tuple[Site, ...]  # those of them whose rows can have probes; the others have dummies
    table: Tensor  # [S, R, H] model dtype
    any_active: Tensor  # [S, 1] bool
    scales: Tensor  # [R] float32
    dynamic_vec: Tensor  # [S, H] float32
    monitor_probe: Tensor  # [S, H] float32
    monitor_params: Tensor  # [S, 3] float32
    monitor_active: Tensor  # [S, 1] bool
    row_probes: Tensor  # [M, R, H] float32, of the M sites with the row monitor
    row_params: Tensor  # [M, R, 2] float32
    row_monitor_active: Tensor  # [S, 1] bool
    token_slab: Tensor  # [T, 64] uint8, contiguous: copying the first N rows sets all per-token values of a step
    index: Tensor  # [T] int64, a view of the slab like the three below
    row_gate: Tensor  # [T] float32
    token_scales: Tensor  # [T] float32
    decode_mask: Tensor  # [T] float32
    gates: "GateBuffers | None"  # None where the engine serves none
    slots: "SlotBuffers | None"  # likewise
    spans: "SpanBuffers | None"  # likewise
    states: tuple[SiteState, ...]  # of each site, on the host

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        hidden_size: int,
        max_rows: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        row_monitor: bool | Collection[Site] = False,
        gates: int = 0,
        max_probes: int = 1,
        probe_sites: Collection[Site] | None = None,
        slots: SlotForm | None = None,
        slot_sites: Collection[Site] | None = None,
        span_requests: int = 0,
    ) -> None:
        """`gates` per token, reading at most `max_probes` - 1 probes; their rows are among the `max_rows`.

        Probes are read at `probe_sites`, by default at every site. Rows can have probes of their own at the sites of
        `row_monitor`; True is every site. Slots of the form `slots` act at `slot_sites`, by default at every site.
        `span_requests` with spans can be served at one time.
        """
        self.sites = tuple(sorted(set(sites), key=site_order))
        self._position = {site: position for position, site in enumerate(self.sites)}
        count = len(self.sites)
        self.states = tuple(SiteState() for _ in self.sites)

        def stacked(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return aligned(count, shape, dtype, device)

        self.table = stacked(max_rows, hidden_size, dtype=dtype)
        self.any_active = stacked(1, dtype=torch.bool)
        self.dynamic_vec = stacked(hidden_size)
        self.monitor_probe = stacked(hidden_size)
        self.monitor_params = stacked(3)
        self.monitor_params[:, 1] = 1.0
        self.monitor_active = stacked(1, dtype=torch.bool)
        self.row_monitor_active = stacked(1, dtype=torch.bool)
        monitored = self.sites if row_monitor is True else row_monitor or ()
        self.row_monitor_sites = tuple(site for site in self.sites if site in monitored)
        self.row_probes = aligned(len(self.row_monitor_sites), (max_rows, hidden_size), torch.float32, device)
        self.row_params = row_params(len(self.row_monitor_sites), max_rows, device)
        self._monitor_off = torch.zeros(1, dtype=torch.bool, device=device)
        self.scales = torch.ones(max_rows, dtype=torch.float32, device=device)
        self.token_slab = torch.zeros(max_tokens, TOKEN_BYTES, dtype=torch.uint8, device=device)
        self.index, self.row_gate, self.token_scales, self.decode_mask = token_views(self.token_slab)
        self.row_gate.fill_(1.0)
        self.gates: GateBuffers | None = None
        if gates:
            self.gates = GateBuffers(
                self.sites,
                count=gates,
                hidden_size=hidden_size,
                max_probes=max_probes,
                max_tokens=max_tokens,
                probe_sites=probe_sites,
                device=device,
            )
        self.slots: SlotBuffers | None = None
        if slots is not None:
            self.slots = SlotBuffers(
                self.sites, slots, max_rows=max_rows, max_tokens=max_tokens, slot_sites=slot_sites, device=device
            )

        self.spans: SpanBuffers | None = None
        if span_requests:
            self.spans = SpanBuffers(span_requests, max_tokens=max_tokens, gates=gates, device=device)

    def attach(self, module: nn.Module, site: Site) -> None:
        """Register this site's tensors on `module` as non-persistent buffers. Raises KeyError for an unknown site."""
        at = self._position[site]
        probes, params = row_monitor_dummies(self.table.device)
        if site in self.row_monitor_sites:
            place = self.row_monitor_sites.index(site)
            probes, params = self.row_probes[place], self.row_params[place]
        by_field = {
            "steering_table": self.table[at],
            "steering_index": self.index,
            "any_active": self.any_active[at],
            "steering_scales": self.scales,
            "steering_dynamic_vec": self.dynamic_vec[at],
            "steering_token_scales": self.token_scales,
            "steering_row_gate": self.row_gate,
            "steering_monitor_probe": self.monitor_probe[at],
            "steering_monitor_params": self.monitor_params[at],
            "steering_monitor_active": self.monitor_active[at],
            "steering_decode_mask": self.decode_mask,
            "steering_monitor_probe_table": probes,
            "steering_monitor_row_params": params,
            "steering_monitor_row_active": self.row_monitor_active[at],
        }
        for field, tensor in by_field.items():
            module.register_buffer(buffer_name(field, site.hook), tensor, persistent=False)
        module.register_buffer(MONITOR_OFF, self._monitor_off, persistent=False)
        set_site_state(module, site.hook, self.states[at])
        if self.gates is not None:
            self.gates.attach(module, site)
        if self.slots is not None:
            self.slots.attach(module, site)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held, row-monitor tensors of resized modules not included."""
        in_slab = {id(self.index), id(self.row_gate), id(self.token_scales), id(self.decode_mask)}
        tensors = [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor) and id(tensor) not in in_slab]
        apart = sum(owner.nbytes for owner in (self.gates, self.slots, self.spans) if owner is not None)
        return apart + sum(tensor.untyped_storage().nbytes() for tensor in tensors)
