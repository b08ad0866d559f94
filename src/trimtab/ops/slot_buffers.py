"""The tensors of slots: what every row reads, takes and writes at each site beside what it adds.

`SlotBuffers` owns them for one engine and registers them on each steered module. Directions are rows of the site's own
table, and a token's slots are those of its row. Where an engine has no slots, none of this exists.
"""

from collections.abc import Collection, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.ops.args import SLOT_PARAMS, SlotForm, SlotOpArgs
from trimtab.ops.gate_buffers import gate_count, gate_values
from trimtab.ops.reference import Slots
from trimtab.ops.site_buffers import aligned_record
from trimtab.sites import HookPoint, Site


@cache
def slot_record(form: SlotForm) -> np.dtype[np.void]:
    """A row's line of `SlotBuffers.slab`: `rows` int64 [K, C], `codes` int32 [K, 2], `params` float32 [K, 10] and `mix`
    float32 [K, K], as in `SlotOpArgs`; and `places` int32 [K], where the corrections of a slot are summed, counted from
    1. Each part starts on 16 bytes. A row without slots has zeros.
    """
    count = form.count
    return aligned_record(
        {
            "rows": (np.int64, (count, form.rows)),
            "codes": (np.int32, (count, 2)),
            "params": (np.float32, (count, SLOT_PARAMS)),
            "mix": (np.float32, (count, count)),
            "places": (np.int32, (count,)),
        }
    )


_READ = {"rows": torch.int64, "codes": torch.int32, "params": torch.float32, "mix": torch.float32}
_PARTS = {**_READ, "places": torch.int32}
_WRITTEN = "corrections"


class SlotBuffers:
    """Device state of an engine's slots: S sites at which slots can act, R rows, K slots per row and site, T tokens."""

    sites: tuple[Site, ...]  # in forward order
    form: SlotForm
    slab: Tensor  # [S, R, B] uint8, lines of `slot_record`, contiguous
    rows: Tensor  # [S, R, K, C] int64, a view of the slab like the three below
    codes: Tensor  # [S, R, K, 2] int32
    params: Tensor  # [S, R, K, 10] float32
    mix: Tensor  # [S, R, K, K] float32
    places: Tensor  # [S, R, K] int32
    corrections: Tensor  # [S, K, T] float32: what slots did on each token in the last pass in which they could act

    def __init__(
        self,
        sites: Sequence[Site],
        form: SlotForm,
        *,
        max_rows: int,
        max_tokens: int,
        slot_sites: Collection[Site] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """`sites` in forward order; slots act at those of them that are in `slot_sites`, by default at all.

        Raises ValueError for a form of no slots or of no response.
        """
        if form.count < 1 or not form.responses:
            raise ValueError(f"An engine with slots has at least one, and a response for it; got {form}")
        self.form = form
        self.sites = tuple(site for site in sites if slot_sites is None or site in slot_sites)
        self._position = {site: position for position, site in enumerate(self.sites)}
        record = slot_record(form)
        self.slab = torch.zeros(len(self.sites), max_rows, record.itemsize, dtype=torch.uint8, device=device)
        self.rows, self.codes, self.params, self.mix, self.places = (self._part(record, name) for name in _PARTS)
        shape = len(self.sites), form.count, max_tokens
        self.corrections = torch.zeros(shape, dtype=torch.float32, device=device)

    def _part(self, record: np.dtype[np.void], name: str) -> Tensor:
        """The view [S, R, *shape] of one part of all lines."""
        assert record.fields is not None
        inner, start = record.fields[name][:2]
        kind, shape = _PARTS[name], (*self.slab.shape[:2], *inner.shape)
        first = start // kind.itemsize
        return self.slab.view(kind)[..., first : first + inner.itemsize // kind.itemsize].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return self.slab.nbytes + self.corrections.nbytes

    def position(self, site: Site) -> int | None:
        """Where the slab holds `site`; None where no slot can act."""
        return self._position.get(site)

    def attach(self, module: nn.Module, site: Site) -> None:
        """Register the tensors that `site` reads on `module`, as non-persistent buffers; none where no slot can act."""
        at = self.position(site)
        if at is None:
            return
        for name in (*_READ, _WRITTEN):
            module.register_buffer(_buffer_name(name, site.hook), getattr(self, name)[at], persistent=False)
        for number, correction in enumerate(self.corrections[at]):
            module.register_buffer(_buffer_name(f"{_WRITTEN}_{number}", site.hook), correction, persistent=False)
        setattr(module, _form_name(site.hook), self.form)


def slot_form(module: nn.Module, hook: HookPoint) -> SlotForm | None:
    """What slots `module` serves at `hook`, None where it serves none; a constant while it is traced."""
    form: SlotForm | None = getattr(module, _form_name(hook), None)
    return form


def steered_dtype(module: nn.Module, hook: HookPoint, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which operators steer a tensor of `dtype` at `hook` of `module`, to be rounded once behind them all.

    float32 where slots look back: they find what was added as the difference to the stream before it, and in 16 bits
    next to a large number there is none.
    """
    form = slot_form(module, hook)
    return torch.float32 if form is not None and form.looks_back else dtype


def site_slots(module: nn.Module, hook: HookPoint) -> Slots:
    """The slots of `module`'s rows at `hook`, for `reference.apply_slots`."""
    table, token_rows = getattr(module, f"steering_table_{hook.value}"), module.steering_index
    rows, codes, params, mix = (getattr(module, _buffer_name(name, hook)) for name in _READ)
    assert isinstance(token_rows, Tensor)
    if gate_count(module, hook):
        values = gate_values(module)
    else:
        values = token_rows.new_empty((0, token_rows.shape[0]), dtype=torch.float32)
    written = [getattr(module, _buffer_name(f"{_WRITTEN}_{number}", hook)) for number in range(rows.shape[1])]
    return Slots(table, token_rows, rows, codes, params, mix, values, written)


def slot_op_args(
    module: nn.Module, hook: HookPoint, steered: Tensor, rest: Tensor | None, hidden: Tensor | None = None
) -> SlotOpArgs:
    """The arguments of `apply_slots_` for `steered` [N, H] at `hook`, which with `rest` [N, H] is the full stream.

    `hidden` [N, H] is what `steered` was before any steering: needed where the form of the slots looks back.
    """
    form, none = slot_form(module, hook), steered.new_empty(0, steered.shape[1])
    before = none if hidden is None or form is None or not form.looks_back else hidden
    written = getattr(module, _buffer_name(_WRITTEN, hook))
    return SlotOpArgs(steered, before, none if rest is None else rest, *site_slots(module, hook)[:-1], written)


def _buffer_name(part: str, hook: HookPoint) -> str:
    return f"steering_table_{hook.value}_slot_{part}"


def _form_name(hook: HookPoint) -> str:
    return f"_steering_{hook.value}_slot_form"
