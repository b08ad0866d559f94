"""How far one call of `generate` has come: which columns of its sequences each forward pass of the decoder brings.

Two things are observed, and both are the same in every model and every release: how wide each pass is, and, after each
step, how long the sequences are (from a stopping criterion, which `generate` calls with them). What the model keeps
between passes, and under which name, does not matter. The prompt comes first, whole or in pieces that follow each
other. From then on a pass brings either the sequences once more, from their beginning, or what is new in them: their
last token, and after it guesses where guesses are made. Anything else is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from trimtab.engines.transformers.prompts import PromptBatch
from trimtab.errors import SteeringError
from trimtab.instrument.taps import hidden_argument

NEVER = int(np.iinfo(np.int64).max)

OnPass = Callable[[int, int], None]
"""Called before a pass with its first column and its width."""


class Progress:
    """Counts what one call has fed. Rows are sequences, `copies` of each prompt side by side; columns include padding.

    `ends` are the tokens after which a row's input is padding. `criteria` are the caller's own: called here, since a
    row that one of them stops is padding too. With `beams` rows change places and none ends before the call does. With
    `guesses` a pass may bring tokens that are taken back.
    """

    def __init__(
        self,
        batch: PromptBatch,
        *,
        copies: int = 1,
        ends: frozenset[int] = frozenset(),
        criteria: Sequence[Callable[..., Any]] = (),
        beams: bool = False,
        guesses: bool = False,
    ) -> None:
        self.width = batch.width
        self.rows = len(batch.lengths) * copies
        self.padding: npt.NDArray[np.int64] = np.repeat(batch.padding, copies)  # [rows], before each row's prompt
        self.passes = 0
        self.ended: npt.NDArray[np.int64] = np.full(
            self.rows, NEVER
        )  # column of each row's last token, where it has one
        self.reached: npt.NDArray[np.int64] = np.zeros(self.rows, np.int64)  # columns of each row that were fed
        self._ends, self._criteria, self._beams, self._guesses = sorted(ends), tuple(criteria), beams, guesses
        self._length = self.width  # columns that the sequences have
        self._prompt_fed = 0
        self._chosen = True  # whether the loop has shown its sequences since the last pass

    @contextmanager
    def watching(self, first_layer: nn.Module, on_pass: OnPass | None = None) -> Iterator[None]:
        """Count every forward pass that reaches `first_layer` while the context lasts."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = hidden_argument(args, kwargs)
            if hidden.dim() != 3:
                raise SteeringError("model", f"its layers take a tensor {tuple(hidden.shape)}, not rows of tokens")
            rows, columns = hidden.shape[:2]
            start = self.enter(rows, columns)
            if on_pass is not None:
                on_pass(start, columns)

        handle = first_layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def enter(self, rows: int, columns: int) -> int:
        """The first column of the pass that now begins. Raises SteeringError where that cannot be known."""
        if rows != self.rows:
            raise SteeringError("model", f"it ran {rows} rows where {self.rows} were due: whose they are is unknown")
        start = self._first_column(columns)
        self._prompt_fed = max(self._prompt_fed, min(start + columns, self.width))
        self._chosen = False
        self.passes += 1
        self.reached = np.maximum(self.reached, np.clip(self.ended, start, start + columns))
        return start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """The stopping criterion: the caller's own criteria decide, and the sequences [rows, length] are seen."""
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in self._criteria:
            done = done | criterion(input_ids, scores, **kwargs)
        if self._chosen:
            if self._guesses:  # some releases ask about the guesses themselves, before they are run
                return done
            raise SteeringError("model", "it chose a token without running its decoder layers: they are not steered")
        if self._prompt_fed < self.width:
            raise SteeringError(
                "model",
                f"it ran {self._prompt_fed} of {self.width} prompt tokens before it chose one: the rest is lost",
            )
        if not self._beams:
            self._note_ends(input_ids, done)
        self._length = input_ids.shape[1]
        self._chosen = True
        return done

    def _first_column(self, columns: int) -> int:
        if self._prompt_fed < self.width:
            if self._prompt_fed + columns <= self.width or self._guesses:
                return self._prompt_fed
            raise SteeringError(
                "model",
                f"it ran {self._prompt_fed + columns} tokens for prompts of {self.width}: tokens that are not in the "
                "prompt (such as the virtual ones of prompt tuning) cannot be told from it",
            )
        if not self._chosen:
            raise SteeringError(
                "model",
                "it ran once more before a token was chosen (a logits processor may have run it): that pass is no part "
                "of the sequences that are steered",
            )
        if columns == 1 or self._guesses:
            return self._length - 1
        if columns == self._length:
            return 0
        raise SteeringError("model", f"it ran {columns} tokens where 1 or all {self._length} were due")

    def _note_ends(self, input_ids: torch.Tensor, done: torch.Tensor) -> None:
        """Only where end tokens exist are rows padded once they are over; otherwise all go on until the last is."""
        if not self._ends:
            return
        new = np.isin(input_ids[:, self._length :].cpu().numpy(), self._ends)
        new[:, -1] |= done.cpu().numpy()
        column = np.where(new.any(axis=1), self._length + new.argmax(axis=1), NEVER)
        self.ended = np.minimum(self.ended, column)
