"""The buffers and the runtime of those steered sites that share a device."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trimtab.errors import SteeringError
from trimtab.instrument.layers import DecoderLayers
from trimtab.ops import SteeringBuffers, emit
from trimtab.ops.args import SlotForm
from trimtab.program import ResolvedSteering
from trimtab.program.counting import SlotUse
from trimtab.program.lowering import contents_of
from trimtab.program.slots import counted
from trimtab.responses import RESPONSES
from trimtab.runtime import GateUse, SteeringRuntime
from trimtab.sites import Site

IntArray = npt.NDArray[np.int64]


class Places(NamedTuple):
    """Where the tokens of a pass stand, for steering that positions or tokens decide."""

    positions: torch.Tensor  # [tokens] int64, those of padding negative or anything
    ids: torch.Tensor | None = None  # [tokens] int64, where ids decide
    before: Sequence[Sequence[int]] | None = None  # per row: all earlier ids, where they may be others than were run


def layer_devices(decoder: DecoderLayers) -> dict[int, torch.device]:
    """Where each layer lives. Raises SteeringError for one whose weights are on no device between passes."""
    homes = {}
    for index, layer in enumerate(decoder):
        tensors = [*layer.parameters(), *layer.buffers()]
        if not tensors or any(tensor.is_meta for tensor in tensors):
            raise SteeringError(
                "model",
                f"the weights of layer {index} are on no device between passes (they are offloaded, or were never "
                "loaded); models on one or several devices can be steered",
            )
        homes[index] = tensors[0].device
    return homes


def slot_form(steering: Sequence[ResolvedSteering]) -> SlotForm | None:
    """What the slots of buffers must be for all of `steering`; None where it has none."""
    programs = [program for one in steering for program in one.programs]
    slots = [slot for program in programs for slot in program.slots]
    if not slots:
        return None
    at_sites = [counted(program.slots) for program in programs]
    responses = sorted({slot.response for slot in slots}, key=lambda name: RESPONSES[name].code)
    most = max(max(counts.values(), default=0) for counts in at_sites)
    return SlotForm(most, tuple(responses), writes=any(slot.write is not None for slot in slots))


class SiteGroup:
    """Steers `sites` on `device`: tensors that pass on another device are moved here and back.

    Buffers are made when all that is steered is known, with room for just that, and made anew when passes grow.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        device: torch.device,
        *,
        dtype: torch.dtype,
        hidden_size: int,
        gates: int,
        slots: SlotForm | None = None,
    ) -> None:
        self.sites = sites
        self._device, self._dtype, self._hidden_size = device, dtype, hidden_size
        self._gates, self._slots = gates, slots
        self._holders = {site.layer: nn.Module() for site in sites}
        self._runtime: SteeringRuntime | None = None
        self._rows = 0
        self._gate_uses: list[tuple[int, GateUse]] = []  # with their rows, of runtimes that grew out of use
        self._slot_uses: list[tuple[int, SlotUse]] = []  # likewise

    def prepare(self, steering: Sequence[ResolvedSteering | None], tokens: int) -> None:
        """Make room for all of `steering`, one for each row of a pass, and for passes of up to `tokens` tokens."""
        with _current(self._device):
            self._prepare(steering, tokens)

    def _prepare(self, steering: Sequence[ResolvedSteering | None], tokens: int) -> None:
        self._keep_uses()
        rows = self._rows = len(steering)
        needed = [contents_of(one, lowers=False) for one in {id(one): one for one in steering if one}.values()]
        buffers = SteeringBuffers(
            self.sites,
            hidden_size=self._hidden_size,
            max_rows=1 + len(set[bytes]().union(*(contents.rows for contents in needed))),
            max_tokens=tokens,
            dtype=self._dtype,
            device=self._device,
            gates=self._gates,
            max_probes=1 + len(set[bytes]().union(*(contents.probes for contents in needed))),
            slots=self._slots,
            slot_sites={site for one in steering if one for slot in one.slots for site in slot.sites},
            span_requests=rows if any(one is not None and one.spans is not None for one in steering) else 0,
        )
        for site in self.sites:
            buffers.attach(self._holders[site.layer], site)
        self._runtime = SteeringRuntime(buffers, max_requests=rows)
        for row, one in enumerate(steering):
            self._runtime.admit(str(row), one)

    def step(
        self,
        names: Sequence[str],
        first: IntArray,
        counts: IntArray,
        lengths: IntArray,
        places: Places | None = None,
    ) -> None:
        """Route the tokens of the pass that now begins: see `SteeringRuntime.step`. Row r is called str(r)."""
        assert self._runtime is not None
        with _current(self._device):
            if places is None:
                self._runtime.step(names, first, counts, lengths)
                return
            for row, before in enumerate(places.before or ()):
                self._runtime.seed(str(row), before, len(before))
            ids = None if places.ids is None else places.ids.to(self._device)
            positions = places.positions.to(self._device)
            self._runtime.step(names, first, counts, lengths, positions=positions, token_ids=ids)

    def steer(self, site: Site, value: torch.Tensor) -> torch.Tensor:
        """`value` [..., H], steered, on the device that it came from."""
        with _current(self._device):
            return emit(self._holders[site.layer], site.hook, value.to(self._device)).to(value.device)

    def gate_uses(self) -> Sequence[tuple[int, GateUse]]:
        """What gates did in this call, with the row of each. To be read once the call is over."""
        self._keep_uses()
        return self._gate_uses

    def slot_uses(self) -> Sequence[tuple[int, SlotUse]]:
        """What slots did in this call, with the row of each. To be read once the call is over."""
        self._keep_uses()
        return self._slot_uses

    def _keep_uses(self) -> None:
        """Take over what the runtime has counted, once: its requests leave it."""
        for row in range(self._rows if self._runtime is not None and (self._gates or self._slots) else 0):
            assert self._runtime is not None
            self._slot_uses += ((row, use) for use in self._runtime.slot_report(str(row)))
            self._gate_uses += ((row, use) for use in self._runtime.gate_report(str(row)))
        self._runtime = None


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Views of one memory under several types can be made only while its device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
