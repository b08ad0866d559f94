"""What a tokenizer says of texts and tokens, remembered for all prompts of it."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from trimtab.program.spans import IdSet
from trimtab.spec.intervals import of_numbers
from trimtab.spec.token_text import Pieces, TokenText, text_of

THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
"""Tags by which models mark their thinking, where the vocabulary has a token for each."""


class _Known:
    """What was found out about one tokenizer; it holds no tokenizer, so that none is kept alive."""

    def __init__(self) -> None:
        self.pieces = Pieces()
        self.special: IdSet | None = None
        self.ids: dict[str, tuple[int, ...]] = {}


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_MOST_TEXTS = 1024


class Vocabulary:
    """A tokenizer of Transformers, or what has as much of one as is asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        try:
            self._known = _KNOWN.setdefault(tokenizer, _Known())
        except TypeError:  # it cannot be a key
            self._known = _Known()

    def text_of(self, ids: Sequence[int]) -> TokenText:
        """The text of a prompt by its tokens, special tokens included."""
        return text_of(self._tokenizer, list(ids), self._known.pieces)

    def ids_of(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that stands alone."""
        known = self._known.ids
        if (found := known.get(text)) is None:
            found = tuple(map(int, self._tokenizer.encode(text, add_special_tokens=False)))
            if len(known) < _MOST_TEXTS and len(text) <= 256:
                known[text] = found
        return found

    @property
    def special(self) -> IdSet:
        """Its special tokens: those that have a part to play, and those that were added as such."""
        if self._known.special is None:
            added = getattr(self._tokenizer, "added_tokens_decoder", None) or {}
            ids = {int(token) for token, said in added.items() if getattr(said, "special", False)}
            ids |= {int(token) for token in getattr(self._tokenizer, "all_special_ids", ()) if token is not None}
            self._known.special = IdSet(of_numbers(sorted(ids)))
        return self._known.special

    def thinking(self) -> tuple[str, str] | None:
        """The tags of its model's thinking, where it has tokens for them."""
        for tags in THINKING:
            if all(len(self.ids_of(tag)) == 1 and self.names(self.ids_of(tag)) == [tag] for tag in tags):
                return tags
        return None

    def names(self, ids: Sequence[int]) -> list[str]:
        """The pieces of the vocabulary that some tokens are."""
        return [str(name) for name in self._tokenizer.convert_ids_to_tokens(list(ids))]

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The text of a chat by the tokenizer's own template, up to where an answer begins."""
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
