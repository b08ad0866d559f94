"""The tensors that a steered module reads: their names, shapes and defaults, and who owns them.

`SteeringBuffers` owns all device state of one engine: each site's tensors are views of stacked ones, and the per-token
values sit side by side in one slab, so a host writes a step with one copy and a row at all sites with one scatter.
`register_steering_buffers` gives a single module tensors of its own instead. Either way a module ends up with the same
non-persistent buffers under the same names, and `steering_op_args` collects them in the operator's order.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from trimtab.ops.args import NO_THRESHOLD, MonitorOpArgs, SteeringOpArgs
from trimtab.ops.emission import emission
from trimtab.ops.gates import GateBuffers
from trimtab.ops.host import SiteState, set_site_state
from trimtab.sites import HookPoint, Site, site_order

TOKEN_BYTES = 64
"""Bytes of one token in the slab: int64 index, then float32 row gate, token scale and decode mask, 16 bytes apart.

Compiled graphs and kernels take their inputs to be aligned. A compiled graph copies an input that is not, at every
call: in vLLM, whose graphs are cut at each attention layer, that is one copy per layer and step.
"""

MONITOR_OFF = "steering_monitor_off"
"""Buffer that stands in for `steering_monitor_active` in cross-layer mode. Nothing ever writes it."""

_ALIGNMENT = 16  # bytes; kernels are compiled per pointer alignment, so every site's views share one
_PER_TOKEN = ("steering_index", "steering_token_scales", "steering_row_gate", "steering_decode_mask")
_SHARED = (*_PER_TOKEN, "steering_scales")


def buffer_name(field: str, hook: HookPoint) -> str:
    """The name of the buffer that feeds `field` of `SteeringOpArgs` at `hook`.

    Tensors shared by all hook points keep the field's name; the others are `steering_table_{hook}` and suffixes of it.
    """
    if field in _SHARED:
        return field
    table = f"steering_table_{hook.value}"
    return table if field == "steering_table" else f"{table}_{field.removeprefix('steering_')}"


_NAMES = {hook: tuple(buffer_name(field, hook) for field in SteeringOpArgs._fields[1:]) for hook in HookPoint}


def has_steering(module: nn.Module, hook: HookPoint) -> bool:
    """Whether `module` holds buffers for `hook`."""
    return hasattr(module, f"steering_table_{hook.value}")


def steering_op_args(module: nn.Module, hook: HookPoint, hidden: Tensor) -> SteeringOpArgs:
    """The operator's arguments for `hidden` [N, H] at `hook`, from the module's own buffers.

    In cross-layer mode the monitor has already acted on the per-token buffers, so its flag is replaced by one that is
    never set: the gate acts once.
    """
    args = SteeringOpArgs(hidden, *[getattr(module, name) for name in _NAMES[hook]])
    if emission(module).cross_layer:
        args = args._replace(steering_monitor_active=getattr(module, MONITOR_OFF))
    return args


def monitor_op_args(module: nn.Module, hook: HookPoint, hidden: Tensor) -> MonitorOpArgs:
    """The monitor's arguments for `hidden` [N, H] at `hook`, from the module's own buffers."""
    args = SteeringOpArgs(hidden, *[getattr(module, name) for name in _NAMES[hook]])
    return MonitorOpArgs(
        hidden_states=hidden,
        probe=args.steering_monitor_probe,
        params=args.steering_monitor_params,
        monitor_active=args.steering_monitor_active,
        steering_token_scales=args.steering_token_scales,
        steering_decode_mask=args.steering_decode_mask,
        steering_row_gate=args.steering_row_gate,
    )


def register_steering_buffers(
    module: nn.Module,
    hidden_size: int,
    *,
    max_tokens: int,
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    hook_points: Sequence[HookPoint] = (HookPoint.POST_BLOCK,),
) -> None:
    """Give `module` tensors of its own for `hook_points`: `max_rows` rows (row 0, which is zero, included).

    Registers nothing for `max_rows=0`. `share_token_buffers` then joins the per-token buffers of several modules.
    """
    if max_rows < 0 or max_tokens < 1 or hidden_size < 1:
        raise ValueError(f"max_rows={max_rows}, max_tokens={max_tokens}, hidden_size={hidden_size}: sizes are positive")
    if max_rows == 0:
        return
    sites = [Site(0, hook) for hook in hook_points]
    owner = SteeringBuffers(
        sites, hidden_size=hidden_size, max_rows=max_rows, max_tokens=max_tokens, dtype=dtype, device=device
    )
    for site in sites:
        owner.attach(module, site)


def resize_row_monitor_buffers(modules: Iterable[nn.Module]) -> None:
    """Replace the row monitor's dummies by full-size tensors wherever a module holds them.

    To be called before warm-up, tracing and graph capture: those keep the tensors that they saw.
    """
    for module in modules:
        for hook in HookPoint:
            if not has_steering(module, hook):
                continue
            table = getattr(module, buffer_name("steering_table", hook))
            probes_name = buffer_name("steering_monitor_probe_table", hook)
            if getattr(module, probes_name).shape == table.shape:
                continue
            probes, params = row_monitor_tensors(table)
            module.register_buffer(probes_name, probes, persistent=False)
            module.register_buffer(buffer_name("steering_monitor_row_params", hook), params, persistent=False)


def row_monitor_tensors(table: Tensor) -> tuple[Tensor, Tensor]:
    """Full-size row-monitor tensors for a site's `table` [R, H]: zero probes, and params that gate nothing."""
    rows, width = table.shape
    probes = torch.zeros(rows, width, dtype=torch.float32, device=table.device)
    return probes, _row_params(1, rows, table.device)[0]


def row_monitor_dummies(device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """What stands in for those tensors at a site without the row monitor: [1, 1] and [1, 2]."""
    return torch.zeros(1, 1, dtype=torch.float32, device=device), _row_params(1, 1, device)[0]


def share_token_buffers(modules: Iterable[nn.Module]) -> None:
    """Make all modules read the per-token buffers of the first one."""
    first: nn.Module | None = None
    for module in modules:
        if not any(has_steering(module, hook) for hook in HookPoint):
            continue
        first = first if first is not None else module
        for name in _PER_TOKEN:
            module.register_buffer(name, getattr(first, name), persistent=False)


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
    ) -> None:
        """`gates` per token, reading at most `max_probes` - 1 probes; their rows are among the `max_rows`.

        Probes are read at `probe_sites`, by default at every site. Rows can have probes of their own at the sites of
        `row_monitor`; True is every site.
        """
        self.sites = tuple(sorted(set(sites), key=site_order))
        self._position = {site: position for position, site in enumerate(self.sites)}
        count = len(self.sites)
        self.states = tuple(SiteState() for _ in self.sites)

        def stacked(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return _aligned(count, shape, dtype, device)

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
        self.row_probes = _aligned(len(self.row_monitor_sites), (max_rows, hidden_size), torch.float32, device)
        self.row_params = _row_params(len(self.row_monitor_sites), max_rows, device)
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

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held, row-monitor tensors of resized modules not included."""
        in_slab = {id(self.index), id(self.row_gate), id(self.token_scales), id(self.decode_mask)}
        tensors = [tensor for tensor in vars(self).values() if isinstance(tensor, Tensor) and id(tensor) not in in_slab]
        gates = 0 if self.gates is None else self.gates.nbytes
        return gates + sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def token_views(slab: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a [T, 64] uint8 slab: index (int64), row gate, token scale and decode mask (float32), each [T].

    Each has a storage object of its own over the slab's memory. Compilers track aliasing by storage, and these four
    never overlap: inside one storage, a graph in which the monitor multiplies two of them could not be compiled.
    """
    floats = slab.view(torch.float32)
    views = slab.view(torch.int64)[:, 0], floats[:, 4], floats[:, 8], floats[:, 12]
    index, row_gate, token_scales, decode_mask = (torch.from_dlpack(view) for view in views)  # type: ignore[attr-defined]
    return index, row_gate, token_scales, decode_mask


def _aligned(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros [count, *shape] whose first-dimension slices all start on the alignment that kernels are compiled for."""
    size = 1
    for extent in shape:
        size *= extent
    step = _ALIGNMENT // dtype.itemsize
    padded = -(-size // step) * step
    return torch.zeros(count, padded, dtype=dtype, device=device)[:, :size].view(count, *shape)


def _row_params(count: int, rows: int, device: torch.device | str | None) -> Tensor:
    params = _aligned(count, (rows, 2), torch.float32, device)
    params[..., 0] = NO_THRESHOLD
    params[..., 1] = 1.0
    return params
