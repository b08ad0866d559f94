"""Places within a prompt or an answer, as `where` names them: ranges of positions, texts, and roles of a chat.

Here, too, are the readers of its small values: whole numbers, texts, lists of tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import PlainValidator, WithJsonSchema

from trimtab.errors import SteeringError
from trimtab.program.spans import LONGEST_SEQUENCE
from trimtab.spec.base import Model, keys_are_text
from trimtab.spec.faults import join
from trimtab.wording import shown, with_suggestions

LARGEST_POSITION = 1 << 24
LARGEST_ID = (1 << 31) - 1
MOST_PLACES = 4096  # of one list, and of one request; and tokens of one list
MOST_TEXTS = 64  # texts and roles of one request: each is looked for in the prompt
LONGEST_TEXT = 1 << 16  # characters

T = TypeVar("T")

TokenRun = str | tuple[int, ...]
"""Some tokens in a row: their ids, or the text that they are for."""


class Range(NamedTuple):
    """Positions from `first` to before `stop`; below 0 they count from the prompt's end, None is an open end."""

    first: int | None
    stop: int | None

    def __str__(self) -> str:
        return f"[{', '.join('null' if end is None else str(end) for end in self)}]"

    def told(self, length: int) -> str:
        """It, and what it comes to in a prompt of `length` tokens, where it counts from the end of that."""
        counted = Range(*(end if end is None or end >= 0 else max(0, end + length) for end in self))
        return str(self) if counted == self else f"{self} (here {counted})"


def text(value: Any) -> str:
    """A text that tokens can stand for. Raises `SteeringError`."""
    if not isinstance(value, str):
        raise SteeringError("", f"got {shown(value)}, want a text")
    if not 0 < len(value) <= LONGEST_TEXT:
        raise SteeringError("", f"has {len(value)} characters, want 1 to {LONGEST_TEXT}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise SteeringError("", "holds half of a surrogate pair, which is in no prompt: give whole characters")
    return value


def token_run(value: Any) -> TokenRun:
    """A text, or the ids of some tokens. Raises `SteeringError`."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, (list, tuple)) and any(isinstance(one, str) for one in value):
        raise SteeringError("", f"got {shown(value)}: a list is one of token ids, and a text stands without it")
    return _each(_listed(value, LONGEST_SEQUENCE, "a text or a list of token ids"), _id)


def single_tokens(value: Any) -> tuple[int | str, ...]:
    """Ids of tokens, and texts of one token each. Raises `SteeringError`."""
    given = _listed(value, MOST_PLACES, "a list of token ids, or of texts of one token each")
    return _each(given, lambda one: text(one) if isinstance(one, str) else _id(one))


_Text = Annotated[str, PlainValidator(text), WithJsonSchema({"type": "string"})]


def _occurrence(value: Any) -> int | str:
    if isinstance(value, str) and value == "all":
        return value
    return _whole(value, -MOST_PLACES, MOST_PLACES, 'a whole number (0 is the first, -1 the last) or "all"')


_Occurrence = Annotated[
    int | Literal["all"],
    PlainValidator(_occurrence),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"const": "all"}]}),
]


class TextPlace(Model):
    """The tokens that hold any character of a text of the prompt; `occurrence` says in which of several places."""

    text: _Text
    occurrence: _Occurrence = 0


class RolePlace(Model):
    """The tokens that hold what messages of one role say, in a chat: nothing of what a template puts around it."""

    role: _Text
    turns: Literal["all", "last"] = "all"


Place = Range | TextPlace | RolePlace


def prompt_places(value: Any) -> str | Place | tuple[Place, ...]:
    """`"all"`, a place, or some. Raises `SteeringError`."""
    what = '"all", a list of ranges [from, to], {"text": ...} or {"role": ...}'
    if isinstance(value, (Mapping, TextPlace, RolePlace)):
        return _place(value)
    return _all(value, what) if isinstance(value, str) else _places(value, what, _place)


def answer_places(value: Any) -> str | tuple[Place, ...]:
    """`"all"` or some ranges. Raises `SteeringError`."""
    what = '"all" or a list of ranges [from, to]'
    return _all(value, what) if isinstance(value, str) else _places(value, what, _range_of_answer)


def _all(value: str, what: str) -> str:
    if value != "all":
        raise SteeringError("", f"got {shown(value)}, want {what}")
    return value


def _places(value: Any, what: str, read: Callable[[Any], Place]) -> tuple[Place, ...]:
    given = _listed(value, MOST_PLACES, what)
    if all(one is None or isinstance(one, (int, np.integer)) for one in given):
        raise SteeringError("", f"got {shown(value)}, want a list of ranges, [[from, to], ...]")
    return _each(given, read)


def _place(value: Any) -> Place:
    if isinstance(value, (TextPlace, RolePlace)):
        return value
    if isinstance(value, (list, tuple)):
        return _range(value, "a whole number or null")
    what = '{"text": ...} or {"role": ...}'
    if not isinstance(value, Mapping):
        raise SteeringError("", f"got {shown(value)}, want a range [from, to], {what}")
    keys_are_text(value)
    if "text" in value and "role" in value:
        said = "has `text` and `role`, and a place is one or the other: give each by itself, in a list of places"
        raise SteeringError("", said)
    if "text" in value:
        return TextPlace(**value)
    if "role" in value:
        return RolePlace(**value)
    hint = "".join(with_suggestions(key, ("text", "role")) for key in list(value)[:1])
    raise SteeringError("", f"got {shown(dict(value))}{hint}, want {what}")


def _range_of_answer(value: Any) -> Range:
    if not isinstance(value, (list, tuple)):
        raise SteeringError("", f"got {shown(value)}, want a range [from, to]: texts and roles are places of a prompt")
    for index, end in enumerate(value):
        if isinstance(end, (int, np.integer)) and end < 0:
            said = f"got {shown(end)}: nobody knows where an answer will end, so its positions count from 0"
            raise SteeringError(f"[{index}]", said)
    return _range(value, "a whole number or null", least=0)


def _range(value: Any, what: str, least: int = -LARGEST_POSITION) -> Range:
    if len(value) != 2:
        raise SteeringError("", f"got {shown(value)}, want two numbers, [from, to]")
    if type(value[0]) is type(value[1]) is int and 0 <= value[0] < value[1] <= LARGEST_POSITION:
        return Range(*value)  # at once, since a request may have thousands

    def end(one: Any) -> int | None:
        return None if one is None else _whole(one, least, LARGEST_POSITION, what)

    found = Range(*_each(value, end))
    first, stop = found
    if stop == 0:
        raise SteeringError("", f"got {found}, which ends before the first token: null is an open end")
    if first is not None and stop is not None and (first < 0) == (stop < 0) and first >= stop:
        fault = "is empty: the token at its end is not part of a range" if first == stop else "runs backwards"
        raise SteeringError("", f"got {found}, which {fault}; want [from, to] with from before to")
    return found


def _whole(value: Any, least: int, most: int, what: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise SteeringError("", f"got {shown(value)}, want {what}")
    if not least <= value <= most:
        raise SteeringError("", f"got {shown(value)}, want {what}, from {least} to {most}")
    return int(value)


def _id(value: Any) -> int:
    return _whole(value, 0, LARGEST_ID, "a token's id, a whole number")


def _listed(value: Any, most: int, what: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise SteeringError("", f"got {shown(value)}, want {what}")
    if not value:
        raise SteeringError("", f"is empty, so it selects nothing: give {what}, or leave it out")
    if len(value) > most:
        raise SteeringError("", f"has {len(value)} items, at most {most} are allowed")
    return value


def _each(values: Iterable[Any], read: Callable[[Any], T]) -> tuple[T, ...]:
    found: list[T] = []
    try:
        found.extend(map(read, values))
    except SteeringError as error:
        raise SteeringError(join(f"[{len(found)}]", error.field), error.message) from None
    return tuple(found)
