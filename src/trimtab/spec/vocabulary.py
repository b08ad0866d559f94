"""What a tokenizer says of texts and tokens, remembered for all prompts of it."""

from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from trimtab.program.spans import IdSet
from trimtab.spec.intervals import of_numbers
from trimtab.spec.token_text import Pieces, TokenText, text_of

T = TypeVar("T")

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
        self.forms: dict[str, tuple[tuple[int, ...], ...]] = {}


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()
_MOST_TEXTS = 1024
_LONGEST = 256  # characters of one that is remembered
_LINE = "\n"


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
        """The tokens of a text that stands alone. What a special token is called is that, also for a tokenizer that
        reads it as text."""
        known = self._known.ids
        if (found := known.get(text)) is None:
            found = tuple(map(int, self._tokenizer.encode(text, add_special_tokens=False)))
            if len(found) > 1 and (own := self._special_called(text)) is not None:
                found = (own,)
            _remember(known, text, found)
        return found

    def forms_of(self, text: str) -> tuple[tuple[int, ...], ...]:
        """The runs of tokens that a text is written as: alone or behind other text, and behind a space.

        Many vocabularies have one token for a word and one for the space and the word; and some put a space before
        what stands alone. A run that ends with another is left out, since whoever finds it finds the other.
        """
        known = self._known.forms
        if (found := known.get(text)) is None:
            line, behind = self.ids_of(_LINE), self.ids_of(_LINE + text)
            forms = [self.ids_of(text), self.ids_of(" " + text)]
            if behind[: len(line)] == line:
                forms.append(behind[len(line) :])
            several = dict.fromkeys(filter(None, forms))
            found = tuple(one for one in several if not any(_ends(one, other) for other in several))
            _remember(known, text, found)
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

    def _special_called(self, text: str) -> int | None:
        try:
            token = self._tokenizer.convert_tokens_to_ids(text)
        except (AttributeError, KeyError, ValueError):
            return None
        return token if isinstance(token, int) and token in self.special and self.names([token]) == [text] else None

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


def _ends(run: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a run ends with another, and is longer."""
    return len(run) > len(other) and tuple(run[-len(other) :]) == tuple(other)


def _remember(known: dict[str, T], text: str, found: T) -> None:
    if len(known) < _MOST_TEXTS and len(text) <= _LONGEST:
        known[text] = found
