"""The tensors of gates: which gates each token has, the probes that they read, and the factors that come of it.

`GateBuffers` owns them for one engine and registers them on each steered module. The rows that gates let through are
rows of the site's own table. Where an engine has no gates, none of this exists.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.ops.args import GATE_PARAMS, GateOpArgs
from trimtab.ops.reference import Gates
from trimtab.ops.site_buffers import aligned_record
from trimtab.sites import HookPoint, Site


def gate_record(count: int) -> np.dtype[np.void]:
    """A token's line of `GateBuffers.slab`: `row` int64, `probe` and `site` int32, each [count], and `params` float32.

    `params` is [count, 5] as in `GateOpArgs.gate_params`. What a site reads of all gates lies side by side, and each
    part starts on 16 bytes for the reason that `TOKEN_BYTES` in `buffers` gives. A token without gates has zeros.
    """
    return aligned_record(
        {
            "row": (np.int64, (count,)),
            "probe": (np.int32, (count,)),
            "site": (np.int32, (count,)),
            "params": (np.float32, (count, GATE_PARAMS)),
        }
    )


_READ = ("gate_rows", "gate_probes", "gate_sites", "gate_params", "gate_probe_table")
_WRITTEN = ("gate_values", "gate_gains", "gate_owns")


class GateBuffers:
    """Device state of an engine's gates: G gates per token, T tokens, P probe rows, hidden size H."""

    probe_sites: tuple[Site, ...]  # those of its sites at which probes are read
    slab: Tensor  # [T, B] uint8, lines of `gate_record`, contiguous: copying the first N sets the gates of a step
    rows: Tensor  # [T, G] int64, a view of the slab like the three below
    probes: Tensor  # [T, G] int32
    sites: Tensor  # [T, G] int32, counted from 1 in forward order
    params: Tensor  # [T, G, 5] float32
    values: Tensor  # [G, T] float32: the factors of the last forward pass
    gains: Tensor  # [G, T] float32: coefficient times factor, between the sites of one pass
    owns: Tensor  # [G, T] float32: of gates that are joined to the one before them, the factors by themselves
    probe_table: Tensor  # [P, H] float32
    numbers: Tensor  # [S, 4] int32, aligned: the first of each line is the site's number

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        count: int,
        hidden_size: int,
        max_probes: int,
        max_tokens: int,
        probe_sites: Collection[Site] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`sites` in forward order, `count` gates per token, `max_probes` rows of probes with row 0.

        Probes are read at `probe_sites`, by default at every site. Sites before the first of them have no part in
        gates: what a gate lets through acts from its probe's site on.
        """
        self.count = count
        self._numbers = {site: position + 1 for position, site in enumerate(sites)}
        self.probe_sites = tuple(site for site in sites if probe_sites is None or site in probe_sites)
        first = next((position for position, site in enumerate(sites) if site in self.probe_sites), len(sites))
        self._gated = frozenset(sites[first:])
        record = gate_record(count)
        self.slab = torch.zeros(max_tokens, record.itemsize, dtype=torch.uint8, device=device)
        self.rows = self._part(record, "row", torch.int64)
        self.probes = self._part(record, "probe", torch.int32)
        self.sites = self._part(record, "site", torch.int32)
        self.params = self._part(record, "params", torch.float32).view(max_tokens, count, GATE_PARAMS)
        self.values = torch.zeros(count, max_tokens, dtype=torch.float32, device=device)
        self.gains = torch.zeros(count, max_tokens, dtype=torch.float32, device=device)
        self.owns = torch.zeros(count, max_tokens, dtype=torch.float32, device=device)
        self.probe_table = torch.zeros(max_probes, hidden_size, dtype=torch.float32, device=device)
        self.numbers = torch.zeros(len(sites), 4, dtype=torch.int32, device=device)
        self.numbers[:, 0] = torch.arange(1, len(sites) + 1, dtype=torch.int32)

    def _part(self, record: np.dtype[np.void], name: str, kind: torch.dtype) -> Tensor:
        """The view [T, n] of one part of all lines."""
        assert record.fields is not None
        inner, start = record.fields[name][:2]
        first = start // kind.itemsize
        return self.slab.view(kind)[:, first : first + inner.itemsize // kind.itemsize]

    def number(self, site: Site) -> int:
        """How the token records call `site`: from 1 on; 0 where this rank does not have it."""
        return self._numbers.get(site, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        written = (self.values, self.gains, self.owns)
        return sum(tensor.nbytes for tensor in (self.slab, *written, self.probe_table, self.numbers))

    def attach(self, module: nn.Module, site: Site) -> None:
        """Register the tensors that `site` reads and writes on `module`, as non-persistent buffers; none before the
        first site of a probe."""
        if site not in self._gated:
            return
        shared = (self.rows, self.probes, self.sites, self.params, self.probe_table)
        for name, tensor in zip((*_READ, *_WRITTEN), (*shared, self.values, self.gains, self.owns), strict=True):
            module.register_buffer(f"steering_{name}", tensor, persistent=False)
        module.register_buffer(_number_name(site.hook), self.numbers[self.number(site) - 1, :1], persistent=False)
        setattr(module, _count_name(site.hook), self.count)
        setattr(module, _probing_name(site.hook), site in self.probe_sites)


def gate_count(module: nn.Module, hook: HookPoint) -> int:
    """How many gates per token `module` serves at `hook`; a constant while it is traced."""
    count: int = getattr(module, _count_name(hook), 0)
    return count


def decides(module: nn.Module, hook: HookPoint) -> bool:
    """Whether a probe can be read at `hook` of `module`; a constant while it is traced."""
    return bool(getattr(module, _probing_name(hook), False))


def decided_gates(module: nn.Module) -> Gates:
    """The gated rows of `module`'s tokens, for `reference.apply_steering`."""
    return Gates(module.steering_gate_rows, module.steering_gate_gains)  # type: ignore[arg-type]


def gate_values(module: nn.Module) -> Tensor:
    """The factors [G, T] of `module`'s tokens: those of gates whose probe has been read in this pass."""
    values: Tensor = module.steering_gate_values  # type: ignore[assignment]
    return values


def gate_op_args(
    module: nn.Module, hook: HookPoint, steered: Tensor, hidden: Tensor, rest: Tensor | None
) -> GateOpArgs:
    """The arguments of `apply_gates_` for `hidden` [N, H] at `hook`, `steered` being what is to be added to."""
    rest = hidden.new_empty(0, hidden.shape[1]) if rest is None else rest
    names = [f"steering_table_{hook.value}", *(f"steering_{name}" for name in _READ), _number_name(hook)]
    names += [f"steering_{name}" for name in _WRITTEN]
    return GateOpArgs(steered, hidden, rest, *[getattr(module, name) for name in names])


def _number_name(hook: HookPoint) -> str:
    return f"steering_table_{hook.value}_gate_site"


def _count_name(hook: HookPoint) -> str:
    return f"_steering_{hook.value}_gate_count"


def _probing_name(hook: HookPoint) -> str:
    return f"_steering_{hook.value}_probing"
