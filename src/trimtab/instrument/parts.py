"""Which modules of a decoder layer are its attention and which its MLP, and how its numbers are compared.

Names are used for one thing only: the attention is the child with weights whose name contains "attn" or "attention"
(every Transformers model obeys this). The rest is seen from what the layer does:

- a child beside the attention that mixes tokens, too, and does not read what the attention returns belongs to it: the
  Mamba mixer of a hybrid layer;
- a child that reads the stream after the MLP was added to it begins a branch of its own: it is not the MLP;
- the other children with weights are the MLP.
"""

from dataclasses import dataclass

import torch
from torch import nn

from trimtab.instrument.layer_replay import LayerProbe, Replay
from trimtab.instrument.layers import ATTENTION_NAME
from trimtab.instrument.weights import has_matrix

SMALL = 0.05  # of a change: quantised activations and rounding in deep modules are less, another tensor is more


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer: names of the attention's and the MLP's, in call order, within the order of all calls.

    `stop` is the first module of a branch behind the MLP; None where there is none.
    """

    natural: Replay
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    stop: str | None

    def between(self, first: str | None, last: str | None) -> list[str]:
        """Modules called after `first` and before `last`. One that is called twice is no place to act at once."""
        return _between(self.natural, first, last)


class Comparison:
    """Compares tensors of one layer's replays, allowing for rounding of what the layer adds up, in the model's dtype.

    `delta` is a change as large as the stream that enters the layer.
    """

    def __init__(self, entering: torch.Tensor, natural: Replay) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(entering.shape, generator=generator).to(entering)
        self.delta = noise * entering.float().std().clamp_min(1e-3).to(entering)
        self._eps = torch.finfo(entering.dtype).eps
        terms = [entering, self.delta, natural.output, *filter(self.same_tokens, (c.leaving for c in natural.children))]
        self._size = torch.stack([term.double().abs().reshape(-1) for term in terms]).sum(0)

    def same_tokens(self, value: torch.Tensor) -> bool:
        """Whether a tensor holds one vector per token, as wide as the stream."""
        return value.shape[-1:] == self.delta.shape[-1:] and value.numel() == self.delta.numel()

    def close(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Equal but for the rounding of a few additions, element by element."""
        a, b = left.double().reshape(-1), right.double().reshape(-1)
        if a.shape != b.shape:
            return False
        size = self._size if self.same_tokens(left) else 0.0
        return bool(((a - b).abs() <= 4 * self._eps * (size + a.abs() + b.abs())).all())

    def same_move(self, natural: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Whether two changes of one tensor are the same, up to rounding and a twentieth of how large they are."""
        before, a, b = natural.double(), left.double(), right.double()
        if not a.numel():
            return b.shape == a.shape
        rounding = 4 * self._eps * float(before.abs().max())
        return bool(((a - b).abs() <= SMALL * float((b - before).abs().max()) + rounding).all())


def find_parts(layer: nn.Module, probe: LayerProbe) -> LayerParts | str:
    """The parts of `layer`, whose recorded call `probe` replays; where there is no such division, why."""
    natural = probe.run()
    names = [call.name for call in natural.children]
    heavy = [name for name in names if has_matrix(layer.get_submodule(name))]
    attention = [name for name in heavy if ATTENTION_NAME.search(name)]
    others = [name for name in heavy if name not in attention]
    refusal = f"one attention sub-block and an MLP are needed, the layer's modules in order are: {', '.join(names)}"
    if len(attention) != 1 or not others or len(set(others)) != len(others):
        return refusal
    compare = Comparison(probe.entering, natural)
    mixers = [name for name in others if _mixes_tokens_beside(name, attention[0], probe, natural, compare)]
    attention = [name for name in heavy if name in (*attention, *mixers)]
    mlp = [name for name in others if name not in mixers]
    stop = next((name for name in mlp[1:] if _begins_a_branch(name, mlp[0], probe, natural, compare)), None)
    mlp = mlp if stop is None else mlp[: mlp.index(stop)]
    if not mlp:
        return refusal
    return LayerParts(natural, tuple(attention), tuple(mlp), stop)


def _mixes_tokens_beside(name: str, attention: str, probe: LayerProbe, natural: Replay, compare: Comparison) -> bool:
    """Whether a module ignores what the attention returns, and lets the first token change the later ones."""
    before = natural.child(name)
    pushed = probe.run({attention: natural.child(attention).leaving + compare.delta.reshape_as(probe.entering)})
    if not torch.equal(pushed.child(name).entering, before.entering):
        return False
    changed = probe.entering.clone()
    changed[..., 0, :] += compare.delta[..., 0, :]
    after = probe.run({attention: natural.child(attention).leaving}, entering=changed).child(name)
    moved = [
        (new.double() - old.double()).abs().reshape(*probe.entering.shape[:-1], -1).amax(-1)
        for new, old in ((after.entering, before.entering), (after.leaving, before.leaving))
    ]  # for what goes in and what comes out: how far each token moved
    into, out = (far > SMALL * far.max() for far in moved)
    return bool((out & ~into).any())


def _begins_a_branch(name: str, mlp_first: str, probe: LayerProbe, natural: Replay, compare: Comparison) -> bool:
    """Whether a module reads the stream itself after the MLP was added: it follows both one to one."""
    given = natural.child(name).entering
    if not compare.same_tokens(given):
        return False
    wanted = given + compare.delta.reshape(given.shape)
    earlier = _between(natural, None, name)
    frozen = {other: natural.child(other).leaving for other in earlier}
    if not compare.close(probe.run(frozen, entering=probe.entering + compare.delta).child(name).entering, wanted):
        return False
    for end in [mlp_first, *_between(natural, mlp_first, name)]:
        leaving = natural.child(end).leaving
        if compare.same_tokens(leaving):
            pushed = probe.run({end: leaving + compare.delta.reshape(leaving.shape)})
            if compare.close(pushed.child(name).entering, wanted):
                return True
    return False


def _between(natural: Replay, first: str | None, last: str | None) -> list[str]:
    order = [call.name for call in natural.children]
    start = 0 if first is None else order.index(first) + 1
    stop = None if last is None else order.index(last)
    return [name for name in order[start:stop] if order.count(name) == 1]
