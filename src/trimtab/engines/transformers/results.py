"""What a steered generation returns."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from trimtab.engines.transformers.progress import Progress
from trimtab.serving.receipt import Receipt


@dataclass(frozen=True)
class Generation:
    """One output. `token_ids` are the new tokens alone, up to and including the end token, without padding; `text` is
    what the tokenizer makes of them, special tokens left out ("" without a tokenizer). `scores` and `logits`,
    [tokens, V] float32, are what each new token was chosen from, after and before logits processors: only with
    `output_scores` and `output_logits`."""

    text: str
    token_ids: list[int]
    receipt: Receipt
    scores: torch.Tensor | None = field(default=None, repr=False, compare=False)
    logits: torch.Tensor | None = field(default=None, repr=False, compare=False)


class Outputs:
    """What `generate` returned, a ModelOutput, taken apart: output i is the i-th sequence."""

    def __init__(self, raw: Any, progress: Progress) -> None:
        self._raw, self._progress = raw, progress
        self._sequences: list[list[int]] = raw.sequences.tolist()
        self._beams: torch.Tensor | None = getattr(raw, "beam_indices", None)  # [outputs, steps]; -1 where none was

    def __len__(self) -> int:
        return len(self._sequences)

    def tokens(self, output: int) -> list[int]:
        """The new tokens of one output, up to and including its last, without what pads it."""
        new = self._sequences[output][self._progress.width :]
        if self._beams is not None:
            return new[: int((self._beams[output] >= 0).sum())]
        return new[: max(int(self._progress.ended[output]) - self._progress.width + 1, 0)]

    def fed(self, output: int) -> tuple[int, int]:
        """How many tokens of the prompt, and how many new ones, went through the model and had a part in the output:
        its last one had none."""
        width, rows = self._progress.width, self._progress.rows
        row = output * rows // len(self)
        reached = min(int(self._progress.reached[row]), width + len(self.tokens(output)) - 1)
        padding = int(self._progress.padding[row])
        return max(min(reached, width) - padding, 0), max(reached - width, 0)

    def per_token(self, name: Literal["scores", "logits"], output: int) -> torch.Tensor | None:
        """The scores or logits from which each new token was chosen, [tokens, V] float32; None if not asked for."""
        steps = getattr(self._raw, name, None)
        if not steps:
            return None
        count = len(self.tokens(output))
        rows = [output] * count if self._beams is None else self._beams[output, :count].tolist()
        return torch.stack([step[row] for step, row in zip(steps, rows, strict=False)])
