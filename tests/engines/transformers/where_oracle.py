"""What `where` should do in Transformers' own forward pass: whole sequences, no cache, and a plain hook behind a layer.

Which tokens are touched comes as a function of a whole sequence; what is done to them is a formula in float64. Nothing
here knows of runs, rows or the engine.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Touched = Callable[[Sequence[int], int], Sequence[bool]]
"""Of the ids of a whole sequence and the length of its prompt: which of its tokens are touched."""


@dataclass
class Act:
    """A formula that changes one token [H] behind a layer, and the tokens that it is for."""

    layer: int
    change: Callable[[torch.Tensor], torch.Tensor]
    touched: Touched


@dataclass
class Hooked:
    """A model whose rows are changed by `acts`, all of them alike; `length` tokens of each are its prompt.

    `seen` are the hidden states [rows, tokens, H] that came to the last layer in the last pass.
    """

    model: Any
    layers: Any
    acts: Sequence[Act]
    length: int
    seen: torch.Tensor | None = None
    _ids: torch.Tensor | None = field(default=None, repr=False)

    @contextmanager
    def hooked(self) -> Any:
        handles = [self.model.register_forward_pre_hook(self._note, with_kwargs=True)]
        handles += [
            layer.register_forward_hook(lambda _m, _args, output, at=index: self._changed(at, output))
            for index, layer in enumerate(self.layers)
        ]
        handles.append(self.layers[-1].register_forward_pre_hook(self._see, with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def run(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits [tokens, V] of one sequence."""
        with torch.no_grad(), self.hooked():
            return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()

    def greedy(self, prompt: Sequence[int], steps: int, ends: Sequence[int] = ()) -> list[int]:
        """The tokens of an answer, all computed anew at each step."""
        ids = list(prompt)
        while len(ids) < len(prompt) + steps and not (len(ids) > len(prompt) and ids[-1] in ends):
            ids.append(int(self.run(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def generate(self, prompt: Sequence[int], **options: Any) -> list[list[int]]:
        """The answers that Transformers' own loop makes."""
        ids = torch.tensor([list(prompt)])
        with self.hooked():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options, use_cache=False
            )
        return [row[len(prompt) :] for row in out.tolist()]

    def _note(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = args[0] if args else kwargs["input_ids"]

    def _see(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    def _changed(self, layer: int, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        assert self._ids is not None
        for row, ids in enumerate(self._ids.tolist()):
            where = [act.touched(ids, self.length) for act in self.acts]
            for place in range(len(ids)):
                x = hidden[row, place].double()
                for act, touched in zip(self.acts, where, strict=True):
                    if act.layer == layer and touched[place]:
                        x = act.change(x)
                hidden[row, place] = x.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
