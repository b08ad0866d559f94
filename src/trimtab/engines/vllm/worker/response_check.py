"""The start-up check of responses: each that was declared makes of what it reads what it should.

Token i of a dummy batch has a row and one slot, whose response is given numbers of which the result is known. What the
model returns must be what it returns where the row alone holds that result, worked out in float64: that rows arrive is
known by then. What the stream is at a site comes from a pass without compiled code, in which the operator is seen. It
must be given all that the module which is steered is given of the stream, both parts where there are two. Each response
is tried at one site of each hook point and class of layer; that a slot acts at all of them is seen elsewhere.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.engines.vllm.worker.attach import Attachment
from trimtab.engines.vllm.worker.dummy_passes import Forward, dummy_forward, is_compiled_whole, uncompiled
from trimtab.engines.vllm.worker.layers import Slot, SteeredJoin, argument
from trimtab.engines.vllm.worker.startup_check import STRENGTH, canary_pattern, chunked, fault
from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.ops.args import SLOT_ROWS
from trimtab.responses import CLIP, DIGITS, FEATURE, KEEP_NORM, NORM, REPLACE, TURN, Response, Stage
from trimtab.sites import HookPoint, Site

_WRONG = 0.15  # of what is asked: far more than rounding, and less than a result of twice the size
_LOUD = 16.0  # times what is added: how much of a score is read, so that none of it can be missing

logger = logging.getLogger("vllm.trimtab")


class Case(NamedTuple):
    """A response, its own numbers, the scores that it sees, and what it makes of them."""

    response: Response
    numbers: tuple[float, ...]
    u: float = 0.0
    c: float = 0.0
    v: float = 0.0


CASES = (
    Case(CLIP, (0.5, 2.0, 3.0), u=0.0, c=1.0),
    Case(CLIP, (0.5, 2.0, 3.0), u=5.0, c=-1.0),
    Case(CLIP, (0.5, -4.0, 9.0), u=5.0, c=0.0),
    Case(TURN, (0.5, -0.75, 0.5, 0.0), u=3.0, v=4.0, c=1.0),
    Case(TURN, (0.5, -0.75, 0.5, 1.0), u=3.0, v=4.0, c=1.0),
    Case(TURN, (0.5, 0.75, 0.5, 1.0), u=-3.0, v=4.0, c=0.0),
    Case(TURN, (0.5, -0.75, 0.5, 2.0), u=3.0, v=-4.0, c=0.0),
    Case(FEATURE, (1.0, 2.0, -1.0, -9.0, 9.0, -1.0), u=2.0, c=1.0),
    Case(FEATURE, (1.0, 2.0, -1.0, 3.5, 9.0, -1.0), u=1.5, c=2.0),
    Case(FEATURE, (1.0, 2.0, -1.0, -9.0, 1.0, -1.0), u=2.0, c=-1.0),
    Case(FEATURE, (1.0, 2.0, -1.0, -9.0, 9.0, -1.0), u=0.5, c=-1.0),
    # How much the next two are given is up to the stream: they must come to once the size of the others.
    Case(REPLACE, ()),
    Case(NORM, ()),
    Case(KEEP_NORM, (0.0,)),
    Case(KEEP_NORM, (1.0,)),
)


class _Try(NamedTuple):
    """A case at a site, read by one of the rows that hold a direction's digits, and the stream there [H] float64."""

    place: int
    case: Case
    digits: int
    stream: Tensor


def require_right_responses(worker: Any, attachment: Attachment, is_v2: bool) -> None:
    """Raise `SteeringError` naming each response that does not do what it should, and where. Leaves the buffers as new.

    Where no stream can be seen, those that look at the whole of it are not tried.
    """
    buffers = attachment.buffers
    assert buffers.slots is not None
    limit, rows = int(worker.vllm_config.scheduler_config.max_num_seqs), buffers.table.shape[1]
    most = min(limit, (rows - 2) // 2)
    if most < 1:
        return
    forward = dummy_forward(worker, is_v2)
    seen = _streams(worker, attachment, is_v2)
    tries = [each for place in _places(attachment) for each in _tries(buffers, place, seen)]
    wrong: dict[str, list[Site]] = {}
    tokens = max(min(most, len(tries)), 2)
    quiet, again = forward(tokens), forward(tokens)
    for part in chunked(range(len(tries)), most):
        chosen = [tries[number] for number in part]
        for each, is_wrong in zip(chosen, _found_wrong(buffers, forward, chosen, quiet, again), strict=True):
            sites = wrong.setdefault(each.case.response.name, []) if is_wrong else []
            sites.append(buffers.sites[each.place])
    if wrong:
        found = "; ".join(f"{name} at {', '.join(map(str, dict.fromkeys(sites)))}" for name, sites in wrong.items())
        raise SteeringError(
            "steering.slots",
            f"a response of slots does not do what it should: {found}. This engine would answer steered otherwise and "
            "does not start. This is a fault of trimtab with this model and version of vLLM; please report it",
        )


def _places(attachment: Attachment) -> list[int]:
    """The last slot site of each hook point and class of layer: behind the first, layers are given all parts."""
    buffers = attachment.buffers
    assert buffers.slots is not None
    found = {}
    for place, site in enumerate(buffers.sites):
        if buffers.slots.position(site) is not None:
            found[site.hook, getattr(attachment.layers.get(site.layer), "name", "")] = place
    return list(found.values())


def _tries(buffers: SteeringBuffers, place: int, seen: Mapping[int, Tensor]) -> Iterator[_Try]:
    assert buffers.slots is not None
    form, unseen = buffers.slots.form, torch.full((buffers.table.shape[2],), math.nan, dtype=torch.float64)
    stream = seen.get(place, unseen)
    for case in CASES:
        response = case.response
        if response.name not in form.responses or (response.sees_two and form.count < 2):
            continue
        local = response.stage is Stage.LOCAL
        if local or (bool(stream.isfinite().all()) and (response is not NORM or bool(stream.any()))):
            # What is read to more digits is read from each of the rows that hold them.
            for digits in range(form.rows - SLOT_ROWS + 1) if response.reads_float32 else [0]:
                yield _Try(place, case, digits, stream)


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what slots are given of the first token: at each site the whole stream [H] float64."""

    def __init__(self, buffers: SteeringBuffers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.streams: dict[int, Tensor] = {}
        self._places = {table.data_ptr(): place for place, table in enumerate(buffers.table)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.trimtab.apply_slots_.default:
            steered, _, rest, table = args[:4]
            whole = steered[0].double() + (rest[0].double() if len(rest) else 0.0)
            self.streams.setdefault(self._places[table.data_ptr()], whole.cpu())
        return func(*args, **(kwargs or {}))


def _streams(worker: Any, attachment: Attachment, is_v2: bool) -> dict[int, Tensor]:
    """By place, what the stream of an unsteered token is there, as far as it can be seen.

    Raises `SteeringError` where slots are given a part of it.
    """
    model, sites = worker.model_runner.get_model(), attachment.buffers.sites
    seen, whole = _Seen(attachment.buffers), dict[Site, Tensor]()
    if not is_compiled_whole(model):
        try:
            forward = dummy_forward(worker, is_v2, eager=True)
            with uncompiled(model), _seeing_parts(attachment, whole), seen:
                forward(2)
        except Exception:  # whatever a model does in a mode that it is not served in, it may serve in its own
            logger.debug("What slots are given was not seen: the pass for it failed", exc_info=True)
    given = {sites[place]: stream for place, stream in seen.streams.items()}
    partial = [site for site, stream in whole.items() if site in given
               and float((given[site] - stream).norm()) > _WRONG * float(stream.norm())]  # fmt: skip
    if partial:
        raise fault("steering.slots", "a slot reads a part of the stream", partial, "steered otherwise")
    return seen.streams


@contextmanager
def _seeing_parts(attachment: Attachment, whole: dict[Site, Tensor]) -> Iterator[None]:
    """Keep in `whole` the sum of both parts of the first token's stream [H] float64, where a module is given two.

    What a layer returns in two parts is seen by what a slot makes of it, in `slot_check`.
    """

    def watch(site: Site, slots: Sequence[Slot]) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            parts = [argument(args, kwargs, slot) for slot in slots]
            if all(isinstance(part, Tensor) for part in parts):
                whole[site] = sum(part.reshape(-1, part.shape[-1])[0].double() for part in parts).cpu()

        return keep

    with ExitStack() as hooks:
        for site, module in attachment.modules.items():
            layer = attachment.layers.get(site.layer)
            if site.hook is HookPoint.POST_ATTN and isinstance(module, SteeredJoin):
                parts: tuple[Slot, ...] = (0, "x"), (1, "residual")
            elif site.hook is HookPoint.PRE_ATTN and layer is not None and layer.residual is not None:
                parts = layer.hidden, layer.residual
            else:
                continue
            handle = module.register_forward_pre_hook(watch(site, parts), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _found_wrong(
    buffers: SteeringBuffers, forward: Forward, tries: Sequence[_Try], quiet: Tensor, again: Tensor
) -> list[bool]:
    """Of each try whether it is. `quiet` and `again` are what the model returns where nothing is steered."""
    tokens = len(quiet)
    with _rows(buffers, tries) as wanted:
        got = forward(tokens)
    with _rows(buffers, tries, wanted):
        right = forward(tokens)
    size, off = (right - quiet).abs().amax(-1), (got - right).abs().amax(-1)
    bound = torch.maximum(_WRONG * size, 4 * (quiet - again).abs().amax(-1))
    # Dummy weights may overflow, which shows nothing either way.
    wrong = ((off > bound) | (got.isnan().any(-1) & ~right.isnan().any(-1))) & quiet.isfinite().all(-1)
    return [bool(flag) for flag in wrong[: len(tries)].tolist()]


@contextmanager
def _rows(buffers: SteeringBuffers, tries: Sequence[_Try], sums: Sequence[Tensor] = ()) -> Iterator[list[Tensor]]:
    """Token i has the i-th try's row and slot, and what they come to is handed back; or a row of `sums` alone."""
    slots, count, table = buffers.slots, len(tries), buffers.table
    assert slots is not None
    wanted: list[Tensor] = []
    try:
        buffers.index[:count] = torch.arange(1, count + 1, device=buffers.index.device)
        for token, each in enumerate(tries):
            buffers.any_active[each.place] = True
            if sums:
                table[each.place, token + 1] = sums[token].to(table)
            else:
                wanted.append(_filled(buffers, each, token, count))
        yield wanted
    finally:
        buffers.index[:count] = 0
        slots.slab[:, : count + 1] = 0
        slots.corrections.zero_()
        for place in {each.place for each in tries}:
            buffers.any_active[place] = False
            table[place, : 2 * count + 1] = 0


def _filled(buffers: SteeringBuffers, each: _Try, token: int, count: int) -> Tensor:
    """Give `token` its row and its slot, and return what is to be added to the stream in all, [H] float64."""
    assert buffers.slots is not None
    slots, table, case, place = buffers.slots, buffers.table, each.case, each.place
    pattern = canary_pattern(table.shape[2]).double()
    x, read = each.stream.nan_to_num(), bool(each.stream.isfinite().all())
    length = float(x.norm())
    size = max(STRENGTH, 2 * length / float(pattern.norm()))
    row, at, slot = token + 1, slots.position(buffers.sites[place]), token % slots.form.count
    assert at is not None
    table[place, row] = (size * pattern.roll(1)).to(table)
    table[place, count + row] = pattern.to(table)
    added, along = (table[place, line].double().cpu() for line in (row, count + row))
    numbers, c, mix, factor, bias = case.numbers, case.c, size, 0.0, case.u
    if case.response is NORM:
        numbers, c, mix = (size / length,), size, 1.0
    elif case.response is REPLACE:
        amount = size * float(pattern.norm()) / length if length else 1.0
        numbers, c, mix = (amount,), amount, size / amount
    elif case.response is not KEEP_NORM:  # its score is of what it reads, brought to the case's by the bias
        factor = _LOUD / (size * float(along.square().sum())) if read else 0.0
        bias = case.u - factor * float((x + added) @ along)
    names = slots.rows[at, row, slot]
    names[0] = count + row
    if each.digits:
        names[0], names[SLOT_ROWS + each.digits - 1] = table.shape[1] - 1, count + row
    names[1] = count + row if slots.form.writes else 0
    slots.codes[at, row, slot, 0] = case.response.code
    own = [factor * 2.0 ** (DIGITS * each.digits), bias, *numbers]
    slots.params[at, row, slot, : len(own)] = torch.tensor(own)
    slots.mix[at, row, slot, slot] = mix
    if case.response.sees_two:
        other = (slot + 1) % slots.form.count
        slots.codes[at, row, other, 0] = case.response.code
        slots.params[at, row, other, 1] = case.v
        slots.params[at, row, slot, -1] = other
    if case.response is KEEP_NORM:
        after = x + added
        return after * (length / float(after.norm())) - x
    taken = numbers[0] * x if case.response is REPLACE else 0.0
    return added + c * mix * along - taken
