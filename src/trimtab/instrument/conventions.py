"""What each hook point is in one kind of decoder layer: found by structure, proved by numbers.

`parts` says which modules are the attention and which the MLP. Where the hook points lie then follows from replaying
the layer with its modules forced to known values:

- with the attention and MLP branches at zero the layer must return its input: a plain residual layer;
- `mlp_in` is a tensor that fixes what the whole MLP does and nothing else: with it held, the MLP must not follow the
  stream, and with the MLP held, nothing must follow it;
- `mlp_out` is the output of the last module after the MLP for which the layer's output follows it one to one;
- `attn_out` is the same behind the attention, with the MLP at zero: the stream must follow it one to one, and so must
  what the MLP is given, unless the layer is parallel;
- the layer is parallel where the MLP's input ignores what the attention returns: it has no `post_attn`;
- else `post_attn` is the tensor that the layer returns when the MLP branch is zero. A module that is given this tensor
  is the place to tap, if writing a change there does all that entering the layer with that change would do, had the
  attention not seen it.

A hook point that fails its test is refused by name, with the reason.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from trimtab.instrument.layer_replay import ChildCall, LayerProbe, Replay
from trimtab.instrument.parts import Comparison, LayerParts, find_parts
from trimtab.instrument.taps import Tap
from trimtab.sites import HookPoint

ALWAYS = {HookPoint.PRE_ATTN: Tap("", "input"), HookPoint.POST_BLOCK: Tap("", "output")}
INNER = (HookPoint.ATTN_OUT, HookPoint.POST_ATTN, HookPoint.MLP_IN, HookPoint.MLP_OUT)

Ends = tuple[str, ...]  # the modules whose outputs, all at zero, silence a branch


@dataclass(frozen=True)
class LayerConvention:
    """Where each hook point of a layer is tapped, and why the others are refused."""

    taps: dict[HookPoint, Tap]
    refusals: dict[HookPoint, str]

    def without(self, reasons: Mapping[HookPoint, str]) -> "LayerConvention":
        """The same less some hook points, for these reasons."""
        kept = {hook: tap for hook, tap in self.taps.items() if hook not in reasons}
        return LayerConvention(kept, {**self.refusals, **reasons})


def derive_convention(layer: nn.Module, probe: LayerProbe) -> LayerConvention:
    """The convention of `layer`, whose recorded call `probe` replays. What does not fit is refused."""
    parts = find_parts(layer, probe)
    if isinstance(parts, str):
        return LayerConvention(dict(ALWAYS), dict.fromkeys(INNER, parts))
    return _Derivation(probe, parts).convention()


class _Branches(NamedTuple):
    """Where the branches of a layer end, and what its stream is between them."""

    attention: Ends
    mlp: Ends
    stream: torch.Tensor  # with the MLP at zero
    asked: Replay  # what a change of the stream that the attention has not seen does to all behind it


class _Derivation:
    """The tests for a layer whose attention and MLP are known."""

    def __init__(self, probe: LayerProbe, parts: LayerParts) -> None:
        self.probe, self.parts = probe, parts
        self.natural = parts.natural
        self.x = probe.entering
        self.compare = Comparison(self.x, self.natural)
        self.delta = self.compare.delta

    def convention(self) -> LayerConvention:
        taps, refusals = dict(ALWAYS), {}
        if (mlp_in := next(filter(self._is_mlp_input, self._mlp_input_candidates()), None)) is not None:
            taps[HookPoint.MLP_IN] = mlp_in
        else:
            refusals[HookPoint.MLP_IN] = (
                f"no one tensor, with one hidden-sized vector per token, is all that the MLP reads ({self._mlp_names})"
            )
        silent = self._silencing_pair()
        if silent is None:
            reason = "the layer does not return its input when its attention and its MLP are silenced"
            refusals |= dict.fromkeys([HookPoint.ATTN_OUT, HookPoint.POST_ATTN, HookPoint.MLP_OUT], reason)
            return LayerConvention(taps, refusals)
        branches = self._branches(*silent)
        if len(branches.mlp) > 1:
            refusals[HookPoint.MLP_OUT] = f"no module returns the MLP branch: the layer adds up {self._mlp_names}"
        elif self._follows(branches.mlp[0]):
            taps[HookPoint.MLP_OUT] = Tap(branches.mlp[0], "output")
        else:
            refusals[HookPoint.MLP_OUT] = "no module returns the MLP branch as it is added: the layer scales it first"
        if (attn_out := next(self._attention_taps(branches), None)) is None:
            refusals[HookPoint.ATTN_OUT] = self._why_no_attention_tap()
        elif self._is_late(attn_out, mlp_in):
            refusals[HookPoint.ATTN_OUT] = "the attention returns when the layer has reached its MLP already"
        else:
            taps[HookPoint.ATTN_OUT] = attn_out
        if self._is_parallel:
            refusals[HookPoint.POST_ATTN] = "attention and MLP run in parallel on one stream: there is none in between"
        elif (post_attn := next(self._post_attention_taps(branches), None)) is not None:
            taps[HookPoint.POST_ATTN] = post_attn
        else:
            refusals[HookPoint.POST_ATTN] = "no module is given the stream that the layer carries past its MLP"
        return LayerConvention(taps, refusals)

    @property
    def _mlp_names(self) -> str:
        return ", ".join(self.parts.mlp)

    def _mlp_input_candidates(self) -> Iterator[Tap]:
        """The input of the MLP's one module; where several are given one tensor, the output of what makes it."""
        first = self.natural.child(self.parts.mlp[0])
        if not self.compare.same_tokens(first.entering):
            return
        yield Tap(first.name, "input")
        for name in reversed(self.parts.between(None, first.name)):
            if self.compare.same_tokens(made := self.natural.child(name).leaving) and self.compare.close(
                made, first.entering
            ):
                yield Tap(name, "output")

    def _is_mlp_input(self, tap: Tap) -> bool:
        """Whether the MLP reads this tensor alone, and nothing but the MLP reads it."""
        value = self._value_at(tap)
        attention = self._natural(self.parts.attention)
        held = self.probe.run(attention, write=(tap, value.reshape_as), entering=self.x + self.delta)
        for name in self.parts.mlp:
            before, after = self.natural.child(name), held.child(name)
            if not self.compare.close(after.entering, before.entering):
                return False
            if not (self.compare.close(after.leaving, before.leaving) or self._carries_stream(before, after)):
                return False
        moved = self.probe.run(self._natural(self.parts.mlp), write=(tap, self._add_delta))
        first = self.natural.child(self.parts.mlp[0]).entering
        return (
            self.compare.close(moved.output, self.natural.output)
            and all(
                self.compare.close(moved.child(name).entering, self.natural.child(name).entering)
                for name in self.parts.attention
            )
            and self.compare.close(moved.child(self.parts.mlp[0]).entering, self._add_delta(first))
        )

    def _carries_stream(self, before: ChildCall, after: ChildCall) -> bool:
        """Whether a module is given the stream to add its result to: it then follows the change one to one."""
        return self.compare.same_tokens(before.leaving) and self.compare.same_move(
            before.leaving, after.leaving, self._add_delta(before.leaving)
        )

    def _silencing_pair(self) -> tuple[Ends, Ends] | None:
        """The ends of the attention and MLP branches: with both at zero, the layer returns its input."""
        parts = self.parts
        after_mlp = parts.between(parts.mlp[-1], parts.stop)
        mlp_ends: list[Ends] = [(name,) for name in reversed([parts.mlp[-1], *after_mlp])]
        mlp_ends += [parts.mlp] if len(parts.mlp) > 1 else []
        after_attention = parts.between(parts.attention[-1], parts.mlp[0])
        for mlp_end in mlp_ends:
            for attention_end in [parts.attention, *((name,) for name in after_attention)]:
                quiet = self.probe.run(self._zeros((*attention_end, *mlp_end)))
                if self.compare.close(quiet.output, self.x):
                    return attention_end, mlp_end
        return None

    def _branches(self, attention: Ends, mlp: Ends) -> _Branches:
        asked = self.probe.run(self._natural(attention), entering=self.x + self.delta)
        return _Branches(attention, mlp, self.probe.run(self._zeros(mlp)).output, asked)

    def _follows(self, mlp_end: str) -> bool:
        """Whether the layer's output is a constant plus exactly this module's output."""
        base = self.probe.run(self._zeros((mlp_end,))).output
        moved = self.probe.run({mlp_end: self.delta}).output
        whole = base + self.natural.child(mlp_end).leaving.reshape(base.shape)
        return self.compare.close(moved, base + self.delta) and self.compare.close(self.natural.output, whole)

    @cached_property
    def _is_parallel(self) -> bool:
        attention = self.parts.attention
        replays = (self.probe.run(forced) for forced in (self._zeros(attention), dict.fromkeys(attention, self.delta)))
        quiet, moved = (replay.child(self.parts.mlp[0]).entering for replay in replays)
        return torch.equal(quiet, moved)

    def _attention_taps(self, branches: _Branches) -> Iterator[Tap]:
        """The outputs of modules that are the attention branch: the last behind the attention comes first."""
        parts = self.parts
        ends = [*parts.attention, *parts.between(parts.attention[-1], parts.stop)]
        asked = self.natural if self._is_parallel else branches.asked
        for end in reversed(ends):
            leaving = self.natural.child(end).leaving
            if end in (*parts.mlp, *branches.mlp) or not self.compare.same_tokens(leaving):
                continue
            moved = self.probe.run({**self._zeros(branches.mlp), end: self.delta}).output
            whole = self.x + leaving.reshape(self.x.shape)
            if self.compare.close(moved, self.x + self.delta) and self.compare.close(branches.stream, whole):
                tap = Tap(end, "output")
                written = self.probe.run(write=(tap, self._add_delta))
                if self._same_effect(parts.mlp, written, asked):
                    yield tap

    def _why_no_attention_tap(self) -> str:
        if len(self.parts.attention) > 1:
            return f"no module returns the attention branch: the layer adds up {', '.join(self.parts.attention)}"
        return "no module returns the attention branch as it is added: the layer scales it, or adds to it, first"

    def _is_late(self, attn_out: Tap, mlp_in: Tap | None) -> bool:
        """Whether a pass reaches the MLP before the attention's branch is there, against the order of hook points."""
        order = [call.name for call in self.natural.children]
        later = [self.parts.mlp[0], *([] if mlp_in is None else [mlp_in.path])]
        return order.index(attn_out.path) > min(map(order.index, later))

    def _post_attention_taps(self, branches: _Branches) -> Iterator[Tap]:
        parts = self.parts
        held_ends = (*branches.attention, *branches.mlp)
        asked_held = self.probe.run(self._natural(held_ends), entering=self.x + self.delta)
        first = parts.mlp[0]
        if torch.equal(branches.asked.child(first).entering, self.natural.child(first).entering):
            return
        for name in [*parts.between(parts.attention[-1], first), first]:
            given = self.natural.child(name).entering
            if not (self.compare.same_tokens(given) and self.compare.close(given, branches.stream)):
                continue
            tap = Tap(name, "input", in_place=True)
            written = self.probe.run(write=(tap, self._add_delta))
            held = self.probe.run(self._natural(branches.mlp), write=(tap, self._add_delta))
            following = (name, *parts.between(name, parts.mlp[-1]), *parts.mlp)
            if self.compare.close(held.output, asked_held.output) and self._same_effect(
                following, written, branches.asked
            ):
                yield tap

    def _same_effect(self, names: Iterable[str], written: Replay, asked: Replay) -> bool:
        """Whether these modules are given what `asked` shows."""
        return all(
            self.compare.same_move(
                self.natural.child(name).entering, written.child(name).entering, asked.child(name).entering
            )
            for name in names
        )

    def _value_at(self, tap: Tap) -> torch.Tensor:
        call = self.natural.child(tap.path)
        return call.entering if tap.side == "input" else call.leaving

    def _zeros(self, names: Ends) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(value) for name, value in self._natural(names).items()}

    def _natural(self, names: Ends) -> dict[str, torch.Tensor]:
        return {name: self.natural.child(name).leaving for name in names}

    def _add_delta(self, value: torch.Tensor) -> torch.Tensor:
        return value + self.delta.reshape(value.shape)
