"""A prompt as `where` looks at it: its tokens, and what a tokenizer and a chat say of them.

Engines make one `PromptTokens` for each prompt that they are to steer by `where`. It costs next to nothing until an
intervention asks for texts, roles, special tokens or tags.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.program.spans import LONGEST_SEQUENCE, MOST_RUNS, IdSet, ends_of
from trimtab.spec.base import NowhereError
from trimtab.spec.chat_text import Render, begin_of_reply, spoken
from trimtab.spec.intervals import Intervals, joined, where_true
from trimtab.spec.places import TokenRun
from trimtab.spec.token_text import TokenText
from trimtab.spec.vocabulary import Vocabulary
from trimtab.wording import shown

_NEVER = (-1, -1)


class Tags(NamedTuple):
    """How a model marks its thinking: the runs of tokens that begin and end it.

    `opens` says that an answer begins by thinking where the prompt holds none of them.
    """

    starts: tuple[TokenRun, ...]
    ends: tuple[TokenRun, ...]
    opens: bool = False


@dataclass(frozen=True, eq=False)
class PromptTokens:
    """The tokens of one prompt, after template, truncation and whatever an engine puts in for images.

    `ids` are None for a prompt of embeddings, of which only the `length` is known. `tokenizer` is one of Transformers,
    or has its `decode`, `encode`, `convert_ids_to_tokens`, `all_special_ids` and `added_tokens_decoder` as far as they
    are needed. `messages` are those of a chat, `render` makes the text of a chat by the template that made the prompt;
    without it the tokenizer's own is tried. `tags` are those of the model; those of the vocabulary are looked for where
    an engine knows none. `vocabulary_size` is how many tokens the model knows.
    """

    length: int
    ids: Sequence[int] | None = None
    tokenizer: Any = None
    messages: Sequence[Mapping[str, Any]] | None = None
    render: Callable[[list[dict[str, Any]]], str] | None = None
    tags: Tags | None = None
    vocabulary_size: int | None = None

    def tokens(self) -> npt.NDArray[np.int64]:
        """The ids, [length]. Raises `SteeringError` for embeddings."""
        return self._array

    def occurrences(self, text: str, occurrence: int | str) -> Intervals:
        """The tokens of a text in this prompt. Raises `SteeringError` where it is not there, or not so often."""
        places = self._found(text) or self._found(unicodedata.normalize("NFC", text))
        if not places:
            said = f"{shown(text)} is not in the prompt, whose {self.length} tokens read {shown(self.text.text)}"
            raise NowhereError("text", said)
        if isinstance(occurrence, str):
            if len(places) > MOST_RUNS:
                said = f"{shown(text)} stands in the prompt {len(places)} times: that is more than {MOST_RUNS} runs"
                raise SteeringError("text", said)
            return self._tokens_of(places)
        if not -len(places) <= occurrence < len(places):
            times = "once" if len(places) == 1 else f"{len(places)} times"
            said = f"got {occurrence}, but the prompt holds {shown(text)} {times}: the first is 0, the last -1"
            raise NowhereError("occurrence", said)
        return self._tokens_of([places[occurrence]])

    def spoken(self, role: str, *, last: bool) -> Intervals:
        """The tokens of what the messages of a role say. Raises `SteeringError` where they cannot be found."""
        if self.messages is None:
            raise NowhereError("role", 'needs a chat, whose messages have roles: give ranges or {"text": ...} instead')
        if (role, last) not in self._spoken:  # a request may ask for one role many times
            found = spoken(self.text.text, self.messages, role, last=last, render=self._renders)
            self._spoken[role, last] = self._tokens_of(found)
        return self._spoken[role, last]

    def holding(self, some: IdSet) -> Intervals:
        """The positions of tokens of a set."""
        return where_true(some.says(self.tokens()))

    @property
    def special(self) -> IdSet:
        """The special tokens of the vocabulary."""
        return self.vocabulary.special

    def runs_of(self, run: TokenRun) -> tuple[tuple[int, ...], ...]:
        """The ids of a run of tokens; of a text in each form that it is written in.

        Raises `SteeringError` for a text of too many tokens, or of none, for one that a token can hide from those who
        watch for these runs, and for ids that the model does not have.
        """
        if not isinstance(run, str):
            return (self._within_vocabulary(run),)
        forms = self.vocabulary.forms_of(run)
        for ids in forms or ((),):
            if not 0 < len(ids) <= LONGEST_SEQUENCE:
                raise SteeringError("", f"{shown(run)} is {len(ids)} tokens, want 1 to {LONGEST_SEQUENCE}")
        if fault := self.vocabulary.fault_of(run):
            raise SteeringError("", f"{shown(run)} could be missed in an answer: {fault}; give ids of tokens instead")
        return forms

    def id_of(self, token: int | str) -> int:
        """The id of one token. Raises `SteeringError` for a text that is not one."""
        if not isinstance(token, str):
            return self._within_vocabulary((token,))[0]
        ids = self.vocabulary.ids_of(token)
        if len(ids) != 1:
            said = f"{shown(token)} is {len(ids)} tokens, {list(ids)}, and not one: give ids; `after` and `until` take"
            raise SteeringError("", f"{said} texts of several")
        return ids[0]

    def thinking(self) -> tuple[tuple[TokenRun, ...], tuple[TokenRun, ...]]:
        """The tags of the model's thinking. Raises `SteeringError` where none are known."""
        self.tokens()
        if self.tags is not None:
            return self.tags.starts, self.tags.ends
        if self.tokenizer is not None and (found := self.vocabulary.thinking()) is not None:
            return (found[0],), (found[1],)
        said = 'no tags are known by which this model marks its thinking: give them, as {"name": "thinking", "start": '
        raise SteeringError("", said + '"<think>", "end": "</think>"}')

    def ends_within(self, starts: Sequence[TokenRun], ends: Sequence[TokenRun], otherwise: bool) -> bool:
        """Whether the last of some tags that the prompt holds is one of `starts`.

        Of a chat that counts which stands behind what was last said to the model.
        """
        last = [max(map(self._end_of, some), default=_NEVER) for some in (starts, ends)]
        if max(last) == _NEVER or max(last)[0] < self._reply:
            return otherwise
        return last[0] > last[1]

    def _end_of(self, tag: TokenRun) -> tuple[int, int]:
        """The token that completes a tag for the last time, and the character behind it; _NEVER where none does.

        A text is looked for as such, since a tokenizer may have joined it with what stands beside it.
        """
        if isinstance(tag, str) and not self.vocabulary.is_added(tag):
            if not (places := self._found(tag) or self._found(unicodedata.normalize("NFC", tag))):
                return _NEVER
            _, behind = places[-1]
            ((_, stop),) = self.text.tokens([(behind - 1, behind)])
            return stop - 1, behind
        token = _last(self.tokens(), self.vocabulary.ids_of(tag) if isinstance(tag, str) else tag)
        return (token, 0) if token >= 0 else _NEVER

    @cached_property
    def _reply(self) -> int:
        """The first token behind what was last said to the model, in a chat; 0 where there is none."""
        if self.messages is None or self.tokenizer is None:
            return 0
        begin = begin_of_reply(self.text.text, self.messages, self._renders)
        return int(np.searchsorted(self.text.starts, begin, side="left"))

    @cached_property
    def _spoken(self) -> dict[tuple[str, bool], Intervals]:
        return {}

    @property
    def _renders(self) -> Render | None:
        own = self.vocabulary.render if hasattr(self.tokenizer, "apply_chat_template") else None
        return self.render or own

    @cached_property
    def text(self) -> TokenText:
        """The decoded prompt. Raises `SteeringError` where it is none of tokens, or there is no tokenizer."""
        return self.vocabulary.text_of(self.tokens().tolist())

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer. Raises `SteeringError` where there is none."""
        self.tokens()
        if self.tokenizer is None:
            raise SteeringError("", "needs a tokenizer, which this engine was not given: give ranges, or ids of tokens")
        return Vocabulary(self.tokenizer)

    @cached_property
    def _array(self) -> npt.NDArray[np.int64]:
        if self.ids is None:
            raise NowhereError("", "needs tokens, and this prompt is made of embeddings: give ranges of positions")
        return np.asarray(self.ids, np.int64)

    def _found(self, text: str) -> list[tuple[int, int]]:
        """The characters of each place of a text, which do not overlap."""
        return [place.span() for place in re.finditer(re.escape(text), self.text.text)]

    def _tokens_of(self, places: Sequence[tuple[int, int]]) -> Intervals:
        return joined(self.text.tokens(places))

    def _within_vocabulary(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        self.tokens()
        size = self.vocabulary_size
        for index, token in enumerate(ids):
            if size is not None and token >= size:
                place = f"[{index}]" if len(ids) > 1 else ""
                raise SteeringError(place, f"got the id {token}, and this model has {size} tokens: 0 to {size - 1}")
        return ids


def _last(tokens: npt.NDArray[np.int64], run: Sequence[int]) -> int:
    """Where the last of some runs ends, -1 where there is none."""
    places = np.flatnonzero(ends_of(tokens, [run]))
    return int(places[-1]) if len(places) else -1
