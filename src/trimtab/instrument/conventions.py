"""What each hook point is in one kind of decoder layer: found by structure, proved by numbers.

Names are used for one thing only: the attention sub-block is the child with weights whose name contains "attn" or
"attention" (every Transformers model obeys this); the other children with weights are the MLP. Where the hook points
lie then follows from replaying the layer with its branches forced to known values:

- with the attention and MLP branches at zero the layer must return its input: a plain residual layer;
- `mlp_out` is the output of the last module after the MLP for which the layer's output follows it one to one;
- the layer is parallel where the MLP's input ignores what the attention returns: it has no `post_attn`;
- else `post_attn` is the tensor that the layer returns when the MLP branch is zero. A module that is given this tensor
  is the place to tap, once overwriting it there was seen to reach the layer's output unchanged.

A hook point that fails its test is refused by name, with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trimtab.instrument.layers import ATTENTION_NAME, has_matrix
from trimtab.instrument.probe import LayerProbe, Replay
from trimtab.instrument.taps import Tap
from trimtab.sites import HookPoint

ALWAYS = {HookPoint.PRE_ATTN: Tap("", "input"), HookPoint.POST_BLOCK: Tap("", "output")}


@dataclass(frozen=True)
class LayerConvention:
    """Where each hook point of a layer is tapped, and why the others are refused."""

    taps: dict[HookPoint, Tap]
    refusals: dict[HookPoint, str]


def derive_convention(layer: nn.Module, probe: LayerProbe) -> LayerConvention:
    """The convention of `layer`, whose recorded call `probe` replays. Never raises: what does not fit is refused."""
    natural = probe.run()
    inner = [HookPoint.POST_ATTN, HookPoint.MLP_IN, HookPoint.MLP_OUT]
    attention, mlp = _sub_blocks(layer, natural)
    if len(attention) != 1 or not mlp:
        found = ", ".join(call.name for call in natural.children) or "none"
        reason = f"one attention sub-block and an MLP are needed, the layer's modules in order are: {found}"
        return LayerConvention(dict(ALWAYS), dict.fromkeys(inner, reason))
    return _Derivation(layer, probe, natural, attention[0], mlp).convention()


class _Derivation:
    """The tests for a layer with one attention sub-block and an MLP of one or more modules, in call order."""

    def __init__(self, layer: nn.Module, probe: LayerProbe, natural: Replay, attention: str, mlp: list[str]) -> None:
        self.probe, self.natural, self.attention = probe, natural, attention
        self.mlp_first, self.mlp_last = mlp[0], mlp[-1]
        self.order = [call.name for call in natural.children]
        self.x = probe.entering
        self.zero = torch.zeros_like(self.x)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.x.shape, generator=generator).to(self.x)
        self.delta = noise * self.x.float().std().clamp_min(1e-3).to(self.x)

    def convention(self) -> LayerConvention:
        taps, refusals = dict(ALWAYS), {}
        if self._same_tokens(self.natural.child(self.mlp_first).entering):
            taps[HookPoint.MLP_IN] = Tap(self.mlp_first, "input")
        else:
            refusals[HookPoint.MLP_IN] = "the MLP does not receive one hidden-sized vector per token"
        silent = self._silencing_pair()
        if silent is None:
            reason = "the layer does not return its input when its attention and its MLP are silenced"
            refusals |= dict.fromkeys([HookPoint.POST_ATTN, HookPoint.MLP_OUT], reason)
            return LayerConvention(taps, refusals)
        attention_end, mlp_end = silent
        if self._follows(mlp_end):
            taps[HookPoint.MLP_OUT] = Tap(mlp_end, "output")
        else:
            refusals[HookPoint.MLP_OUT] = "no module returns the MLP branch as it is added: the layer scales it first"
        if self._is_parallel():
            refusals[HookPoint.POST_ATTN] = "attention and MLP run in parallel on one stream: there is none in between"
        elif (tap := self._post_attention_tap(attention_end, mlp_end)) is not None:
            taps[HookPoint.POST_ATTN] = tap
        else:
            refusals[HookPoint.POST_ATTN] = "no module is given the stream that the layer carries past its MLP"
        return LayerConvention(taps, refusals)

    def _silencing_pair(self) -> tuple[str, str] | None:
        """The ends of the attention and MLP branches: with both at zero, the layer returns its input."""
        mlp_ends = [self.mlp_last, *self._between(self.mlp_last, None)]
        for mlp_end in reversed(mlp_ends):
            for attention_end in [self.attention, *self._between(self.attention, self.mlp_first)]:
                if self._close(self.probe.run({attention_end: self.zero, mlp_end: self.zero}).output, self.x):
                    return attention_end, mlp_end
        return None

    def _follows(self, mlp_end: str) -> bool:
        """Whether the layer's output is a constant plus exactly this module's output."""
        base = self.probe.run({mlp_end: self.zero}).output
        moved = self.probe.run({mlp_end: self.delta}).output
        whole = base + self.natural.child(mlp_end).leaving.reshape(base.shape)
        return self._close(moved, base + self.delta) and self._close(self.natural.output, whole)

    def _is_parallel(self) -> bool:
        quiet = self.probe.run({self.attention: self.zero}).child(self.mlp_first).entering
        moved = self.probe.run({self.attention: self.delta}).child(self.mlp_first).entering
        return torch.equal(quiet, moved)

    def _post_attention_tap(self, attention_end: str, mlp_end: str) -> Tap | None:
        without_mlp = self.probe.run({mlp_end: self.zero})
        without_both = self.probe.run({attention_end: self.zero, mlp_end: self.zero})
        for name in [*self._between(self.attention, self.mlp_first), self.mlp_first]:
            stream = without_mlp.child(name).entering
            if not (self._same_tokens(stream) and self._close(stream, without_mlp.output)):
                continue
            if not self._close(without_both.child(name).entering, self.x):
                continue
            tap = Tap(name, "input", in_place=True)
            written = self.probe.run({mlp_end: self.zero}, write=(tap, self._add_delta))
            expected = without_mlp.output + self.delta
            reaches_mlp = name == self.mlp_first or not torch.equal(
                written.child(self.mlp_first).entering, without_mlp.child(self.mlp_first).entering
            )
            if reaches_mlp and self._close(written.output, expected):
                return tap
        return None

    def _add_delta(self, value: torch.Tensor) -> torch.Tensor:
        return value + self.delta.reshape(value.shape)

    def _between(self, first: str, last: str | None) -> list[str]:
        """Modules called after `first` and before `last`. One that is called twice is no place to act at once."""
        start, stop = self.order.index(first) + 1, None if last is None else self.order.index(last)
        return [name for name in self.order[start:stop] if self.order.count(name) == 1]

    def _same_tokens(self, value: torch.Tensor) -> bool:
        return value.shape[-1] == self.x.shape[-1] and value.numel() == self.x.numel()

    def _close(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Equal but for the rounding of a few additions in the model's dtype, element by element."""
        a, b = left.double().reshape(-1), right.double().reshape(-1)
        size = self.x.double().abs() + self.delta.double().abs() + self.natural.output.double().abs()
        bound = 4 * torch.finfo(self.x.dtype).eps * (size.reshape(-1) + a.abs() + b.abs())
        return a.shape == b.shape and bool(((a - b).abs() <= bound).all())


def _sub_blocks(layer: nn.Module, natural: Replay) -> tuple[list[str], list[str]]:
    """Names of the attention and of the MLP modules among the children with weights, in call order."""
    heavy: Sequence[str] = [c.name for c in natural.children if has_matrix(layer.get_submodule(c.name))]
    attention = [name for name in heavy if ATTENTION_NAME.search(name)]
    return attention, [name for name in heavy if name not in attention]
