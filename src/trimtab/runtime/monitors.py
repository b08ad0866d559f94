"""Monitors: probes that belong to an engine's sites, or to a row, and not to an intervention as gates do.

    of a site   the probe gates every decode token's row there, or there and at all later sites in cross-layer mode
    of a row    the probe gates that row alone, for its decode tokens and at the probe's site

Both are the operator's own (see `trimtab.ops.args`), so both open gradually and leave prefill tokens alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from trimtab.errors import SteeringError
from trimtab.ops.args import NO_THRESHOLD
from trimtab.ops.buffers import SteeringBuffers
from trimtab.program.resolved_gate import ResolvedGate, check_monitor
from trimtab.runtime.upload import FlagUploader, RowUploader
from trimtab.sites import Site
from trimtab.vectors.values import FloatArray
from trimtab.wording import summary

RowProbes = tuple[ResolvedGate, ...]  # at most one per site, in the order of the sites


class SiteMonitors:
    """The monitor of each site, and whether factors on the device are no longer what the last plan made them."""

    def __init__(self, buffers: SteeringBuffers) -> None:
        self._buffers = buffers
        self._position = {site: position for position, site in enumerate(buffers.sites)}
        self._gates: dict[Site, ResolvedGate] = {}
        self._elsewhere: dict[Site, ResolvedGate] = {}
        self._changed: set[Site] = set()
        self._written = (0, 0)  # how many were on here and elsewhere when `write` was called last

    @property
    def gates(self) -> Mapping[Site, ResolvedGate]:
        """What is on here, by site; for reading."""
        return self._gates

    @property
    def idle(self) -> bool:
        """Whether none is on here, was on in the last pass, or has been taken away since."""
        return not (self._gates or self._changed or self._written[0])

    def set(self, gate: ResolvedGate) -> None:
        """Let `gate` be the monitor of its probe's site, in place of any other. Raises SteeringError."""
        check_probe(gate, self._buffers)
        self._gates[gate.site] = gate
        self._changed.add(gate.site)

    def note(self, gate: ResolvedGate) -> None:
        """Remember that another pipeline stage has this monitor, which changes nothing here."""
        check_monitor(gate)
        self._elsewhere[gate.site] = gate
        self._changed.add(gate.site)

    def state(self) -> Iterator[bytes]:
        """Every monitor of the engine, wherever it is, and what the device has yet to see of them, for digests."""
        for gate in sorted((*self._gates.values(), *self._elsewhere.values()), key=lambda gate: gate.digest):
            yield gate.digest
        yield repr((sorted(map(str, self._changed)), sum(self._written))).encode()

    def clear(self, site: Site) -> None:
        """Leave `site` without a monitor. One that has none is no error."""
        if self._gates.pop(site, None) or self._elsewhere.pop(site, None):
            self._changed.add(site)

    def write(self) -> bool:
        """Bring the device up to date; whether monitors were on since the last call.

        If so, they may have multiplied the factors of that plan's tokens, and an equal plan has to be written again.
        """
        for site in self._changed & self._position.keys():
            position, gate = self._position[site], self._gates.get(site)
            if gate is not None:
                self._buffers.monitor_probe[position].copy_(torch.from_numpy(gate.probe.block[0].copy()))
                self._buffers.monitor_params[position].copy_(torch.tensor([*_numbers(gate), 1.0]))
            self._buffers.monitor_active[position] = gate is not None
        self._changed.clear()
        before, self._written = self._written[0], (len(self._gates), len(self._elsewhere))
        return before > 0


class RowMonitors:
    """The probes of rows: written when a row gets new content, and removed when it gets content without any."""

    def __init__(self, buffers: SteeringBuffers) -> None:
        """`buffers` were made with `row_monitor`. Probes at sites that they lack, those of other pipeline stages, are
        remembered and do nothing here."""
        self._position = {site: position for position, site in enumerate(buffers.row_monitor_sites)}
        self._site_position = {site: buffers.sites.index(site) for site in buffers.row_monitor_sites}
        self._sites = len(buffers.sites)
        self._width = buffers.table.shape[2]
        self._held: dict[int, RowProbes] = {}
        self._unwritten: dict[int, RowProbes] = {}
        self._probes = RowUploader(buffers.row_probes, self._directions)
        self._params = RowUploader(buffers.row_params, self._params_of)
        self._flags = FlagUploader(buffers.row_monitor_active)

    def fill(self, row: int, probes: RowProbes) -> None:
        """`row` has new content, which stands behind `probes`."""
        if probes:
            self._held[row] = self._unwritten[row] = probes
        elif self._held.pop(row, None) is not None:
            self._unwritten[row] = ()

    def write(self) -> None:
        """Bring the device up to date."""
        if not self._unwritten:
            return
        if self._position:
            self._probes.write(self._unwritten)
            self._params.write(self._unwritten)
        self._unwritten.clear()
        active = np.zeros(self._sites, np.bool_)
        active[[self._site_position[gate.site] for probes in self._held.values() for gate in self._here(probes)]] = True
        self._flags.write(active)

    def state(self) -> bytes:
        """The probes of each row, and which of them the device has yet to see, for digests."""
        held = {row: [gate.digest.hex() for gate in probes] for row, probes in self._held.items()}
        return repr((sorted(held.items()), sorted(self._unwritten))).encode()

    def _directions(self, probes: RowProbes) -> FloatArray:
        block = np.zeros((len(self._position), self._width), np.float32)
        for gate in self._here(probes):
            block[self._position[gate.site]] = gate.probe.block[0]
        return block

    def _params_of(self, probes: RowProbes) -> FloatArray:
        block = np.tile(np.array([NO_THRESHOLD, 1.0], np.float32), (len(self._position), 1))
        for gate in self._here(probes):
            block[self._position[gate.site]] = _numbers(gate)
        return block

    def _here(self, probes: RowProbes) -> Iterator[ResolvedGate]:
        return (gate for gate in probes if gate.site in self._position)


def require_row_monitor(buffers: SteeringBuffers) -> None:
    """Raise SteeringError where a gate's probe can be read at a site of `buffers` at which no row can have one."""
    readable = () if buffers.gates is None else buffers.gates.probe_sites
    if missing := [site for site in readable if site not in buffers.row_monitor_sites]:
        raise SteeringError("row_monitor", f"rows have no probes at {summary(missing)}, where gates read theirs")


def row_probes(gates: Sequence[ResolvedGate], buffers: SteeringBuffers) -> RowProbes:
    """`gates` as the probes of a row. Raises SteeringError at `probes` where these buffers cannot hold them."""
    if gates and not buffers.row_monitor_sites:
        raise SteeringError("probes", "these buffers hold none: make them with row_monitor=True")
    for gate in gates:
        check_probe(gate, buffers)
        if gate.site not in buffers.row_monitor_sites:
            can = summary(buffers.row_monitor_sites)
            raise SteeringError("probes", f"one is read at {gate.site}; in these buffers rows have probes at {can}")
    ordered = sorted(gates, key=lambda gate: buffers.sites.index(gate.site))
    for one, other in pairwise(ordered):
        if one.site == other.site:
            raise SteeringError("probes", f"two are read at {one.site}; a row has one probe per site")
    return tuple(ordered)


def check_probe(gate: ResolvedGate, buffers: SteeringBuffers) -> None:
    """Raise SteeringError where `gate` cannot be a monitor in these buffers."""
    check_monitor(gate)
    if gate.site not in buffers.sites:
        raise SteeringError("probe", f"is read at {gate.site}; these buffers have {summary(buffers.sites)}")
    if gate.probe.hidden_size != (width := buffers.table.shape[2]):
        raise SteeringError("probe", f"has width {gate.probe.hidden_size}; the model's is {width}")


def _numbers(gate: ResolvedGate) -> tuple[float, float]:
    """Threshold and sharpness as the operator knows them: 1 - sigmoid(z) is sigmoid(-z)."""
    return gate.threshold, -gate.sharpness if gate.invert else gate.sharpness
