"""What a tokenizer says of texts and tokens, remembered for all prompts of it."""

from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from trimtab.errors import SteeringError
from trimtab.program.spans import IdSet
from trimtab.spec.hiding import changed_by, hidden_by
from trimtab.spec.intervals import of_numbers
from trimtab.spec.token_text import Pieces, TokenText, is_escaped_byte, text_of
from trimtab.wording import shown

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
        self.names: tuple[str, ...] | None = None
        self.faults: dict[str, str] = {}


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

    def fault_of(self, text: str) -> str:
        """Why those who watch an answer for the `forms_of` a text may not see that it is there; "" if they will.

        What is one added token is cut out before anything is joined, so that only a longer one of its kind hides it.
        Raises `SteeringError` where the tokenizer does not tell its vocabulary.
        """
        known = self._known.faults
        if (found := known.get(text)) is None:
            forms = self.forms_of(text)
            names = tuple(self._added) if self.is_added(text) else self._names
            if (hider := hidden_by(text, names, self.ids_of, forms)) is not None:
                found = f"{shown(hider)} is one token, which holds a part of it and more"
            elif any(self._unknown in form for form in forms):
                found = "it has characters for which the tokenizer has no token"
            elif (beside := changed_by(text, self.ids_of, forms, self._unknown)) is not None:
                found = f"{shown(beside)} has other tokens in its place"
            _remember(known, text, found := found or "")
        return found

    @property
    def _unknown(self) -> int | None:
        """The token that stands for what has none."""
        return getattr(self._tokenizer, "unk_token_id", None)

    def is_added(self, text: str) -> bool:
        """Whether a text is an added token, or a special one."""
        ids = self.ids_of(text)
        if len(ids) != 1:
            return False
        return self._added.get(text) == ids[0] or (ids[0] in self.special and self.names(ids) == [text])

    @property
    def special(self) -> IdSet:
        """Its special tokens: those that have a part to play, and those that were added as such."""
        if self._known.special is None:
            added = getattr(self._tokenizer, "added_tokens_decoder", None) or {}
            ids = {int(token) for token, said in added.items() if getattr(said, "special", False)}
            ids |= {int(token) for token in getattr(self._tokenizer, "all_special_ids", ()) if token is not None}
            self._known.special = IdSet(of_numbers(sorted(ids)))
        return self._known.special

    @property
    def _added(self) -> dict[str, int]:
        """The added tokens that are found anywhere, by their text."""
        added = getattr(self._tokenizer, "added_tokens_decoder", None) or {}
        return {str(one): int(token) for token, one in added.items() if not getattr(one, "single_word", False)}

    @property
    def _names(self) -> tuple[str, ...]:
        """What its tokens are called, but for special ones and single bytes: those are in no text of several."""
        if self._known.names is None:
            if (vocabulary := getattr(self._tokenizer, "get_vocab", None)) is None:
                raise SteeringError("", "this tokenizer does not tell which tokens it has: give ids of tokens")
            some = vocabulary().items()
            names = (name for name, token in some if token not in self.special and not is_escaped_byte(name))
            self._known.names = tuple(names)
        return self._known.names

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
    if len(text) <= _LONGEST:
        if len(known) >= _MOST_TEXTS:
            known.clear()  # at once, since other threads may look
        known[text] = found
