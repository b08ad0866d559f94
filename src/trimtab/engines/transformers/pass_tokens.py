"""Which tokens a forward pass brings, and what came before them: for steering that the tokens themselves decide.

The ids of a pass are those that the model's input embedding is given. That is the same in every family, with a cache
and without one, for guesses too. What came before them is needed only where rows change places (beams) or tokens are
taken back (guesses): there the sequences are seen from which `generate` prepares the inputs of each pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from trimtab.errors import SteeringError


class PassTokens:
    """Sees the tokens of each pass of one call. With `rewinds` it sees the sequences before it, too."""

    def __init__(self, *, rewinds: bool = False) -> None:
        self.rewinds = rewinds
        self._ids: torch.Tensor | None = None
        self._sequences: torch.Tensor | None = None

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """See what `model` runs while the context lasts."""

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, torch.Tensor) and given.dim() == 2 and not given.is_floating_point():
                self._ids = given

        handle = model.get_input_embeddings().register_forward_pre_hook(before, with_kwargs=True)
        try:
            with self._sequences_of(model):
                yield
        finally:
            handle.remove()

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """The ids [rows, columns] of the pass that now begins. Raises SteeringError where they were not seen."""
        ids, self._ids = self._ids, None
        if ids is None or ids.shape != (rows, columns):
            raise SteeringError(
                "model",
                f"its input embedding was not given the {rows} x {columns} token ids of a forward pass; what the "
                "answer's tokens decide (`where`: section, after, until, tokens, special_tokens) needs them",
            )
        return ids

    def before(self, columns: int) -> list[list[int]]:
        """The first `columns` of each row's sequence, padding included, as they are in the pass that now begins."""
        if self._sequences is None or self._sequences.shape[1] < columns:
            raise SteeringError(
                "model", "it ran a pass whose sequences were not seen; without beams and guesses none are needed"
            )
        return self._sequences[:, :columns].tolist()

    @contextmanager
    def _sequences_of(self, model: Any) -> Iterator[None]:
        if not self.rewinds:
            yield
            return
        name = "prepare_inputs_for_generation"
        prepare, own = getattr(model, name), vars(model).get(name)

        @wraps(prepare)
        def seeing(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._sequences = input_ids
            return prepare(input_ids, *args, **kwargs)

        setattr(model, name, seeing)
        try:
            yield
        finally:
            delattr(model, name)
            if own is not None:
                setattr(model, name, own)
