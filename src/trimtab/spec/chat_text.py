"""Where in the text of a chat prompt the messages of a role stand.

What a template writes around messages may look like one: "user" is what a user may say. So the template is asked: it
renders the chat with marks in place of what was said, and what it writes between the marks must be what the prompt
holds between the messages, to the letter. Where there is no such template, messages are looked for in their order, and
believed where there is one way only to find them all.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trimtab.spec.base import NowhereError
from trimtab.wording import shown, summary

Message = Mapping[str, Any]
Render = Callable[[list[dict[str, Any]]], str]
Characters = tuple[int, int]
"""The first, and the one behind the last."""

_MARK = re.compile("q[0-9]+x[0-9]+z")


@dataclass(frozen=True)
class Said:
    """One text of a message."""

    message: int
    part: int | None  # of a list of parts; None: the message is one text
    text: str

    @property
    def forms(self) -> tuple[str, ...]:
        """How it may stand in a prompt: templates strip messages, tokenizers compose characters."""
        stripped = (self.text, self.text.rstrip(), self.text.lstrip(), self.text.strip())
        return tuple(dict.fromkeys((*stripped, *(unicodedata.normalize("NFC", form) for form in stripped))))

    @property
    def visible_forms(self) -> Iterator[str]:
        """Those that can be told from what a template may write anywhere."""
        return filter(str.strip, self.forms)


def spoken(
    text: str, messages: Sequence[Message], role: str, *, last: bool, render: Render | None = None
) -> list[Characters]:
    """What messages of `role` say, or the last of them, in the `text` of a prompt. Raises `NowhereError`."""
    roles = [str(message.get("role", "")) for message in messages]
    if role not in roles:
        known = summary(list(dict.fromkeys(roles)))
        raise NowhereError("role", f"no message has the role {shown(role)}; the roles of this chat are {known}")
    wanted = [index for index, own in enumerate(roles) if own == role][-1 if last else 0 :]
    every = [said for index, message in enumerate(messages) for said in _said(index, message) if said.text]
    mine = [said for said in every if said.message in wanted]
    if not mine:
        raise _nothing(role)
    found = _by_template(text, messages, every, render) if render is not None else None
    if found is None:
        found = _by_order(text, every, mine)
    if missing := next((said for said in mine if said not in found), None):
        raise _not_there(missing, role)
    places = [found[said] for said in mine]
    if all(first == stop for first, stop in places):
        raise _nothing(role)
    return places


def begin_of_reply(text: str, messages: Sequence[Message], render: Render | None = None) -> int:
    """From which character of the `text` of a prompt on stands what follows the last message that is not the
    assistant's: what a template writes for an answer to begin, and an answer that is begun. 0 where nothing tells."""
    to_model = [index for index, message in enumerate(messages) if message.get("role") != "assistant"]
    every = [said for index, message in enumerate(messages) for said in _said(index, message) if said.text]
    last = next((said for said in reversed(every) if said.message == to_model[-1]), None) if to_model else None
    if last is None:
        return 0
    mark = _marks([last], text)[last]
    if render is not None:
        with suppress(Exception):  # a template is a program that others wrote, and may refuse marks as it likes
            _, found, behind = render(_marked(messages, {last: mark})).rpartition(mark)
            if found and text.endswith(behind):
                return len(text) - len(behind)
    return _forward(text, every).get(last, (0, 0))[1]


def _nothing(role: str) -> NowhereError:
    return NowhereError("role", f"what is said as {shown(role)} is no text, or an empty one: nothing is selected")


def _not_there(said: Said, role: str) -> NowhereError:
    where = f"messages[{said.message}]"
    return NowhereError(
        "role",
        f"what {where} says as {shown(role)} cannot be found in the prompt, whose template or truncation changed it: "
        'select it by ranges, or by {"text": ...}',
    )


def _said(index: int, message: Message) -> Iterator[Said]:
    content = message.get("content")
    if isinstance(content, str):
        yield Said(index, None, content)
    elif isinstance(content, Iterable) and not isinstance(content, (bytes, Mapping)):
        for place, part in enumerate(content):
            if isinstance(part, str):
                yield Said(index, place, part)
            elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield Said(index, place, part["text"])


def _by_template(
    text: str, messages: Sequence[Message], every: Sequence[Said], render: Render
) -> dict[Said, Characters] | None:
    """What was said, found between what the template writes; None where the prompt is not of this template."""
    marks = _marks(every, text)
    try:
        rendered = render(_marked(messages, marks))
    except Exception:  # a template is a program that others wrote, and may refuse marks as it likes
        return None
    between, order = _parted(rendered, marks)
    if between is None or not order:
        return None
    begin = text.find(between[0])
    return None if begin < 0 else _read_along(text, begin + len(between[0]), order, between[1:])


def _marks(every: Sequence[Said], text: str) -> dict[Said, str]:
    salt = 0
    while any(f"q{salt}x" in said.text for said in every) or f"q{salt}x" in text:
        salt += 1
    return {said: f"q{salt}x{place}z" for place, said in enumerate(every)}


def _marked(messages: Sequence[Message], marks: Mapping[Said, str]) -> list[dict[str, Any]]:
    copies = [dict(message) for message in messages]
    for said, mark in marks.items():
        if said.part is None:
            copies[said.message]["content"] = mark
            continue
        parts = list(copies[said.message]["content"])
        old = parts[said.part]
        parts[said.part] = mark if isinstance(old, str) else {**old, "text": mark}
        copies[said.message]["content"] = parts
    return copies


def _parted(rendered: str, marks: Mapping[Said, str]) -> tuple[list[str] | None, list[Said]]:
    """What stands before, between and behind the marks, and whose they are; None where they are not in their order, or
    one is there twice."""
    whose = {mark: (place, said) for place, (said, mark) in enumerate(marks.items())}
    between: list[str] = []
    order: list[Said] = []
    end, before = 0, -1
    for found in _MARK.finditer(rendered):  # once through the text, however many messages there are
        place, said = whose.get(found[0], (None, None))
        if place is None or said is None:
            continue
        if place <= before:
            return None, []
        between.append(rendered[end : found.start()])
        order.append(said)
        end, before = found.end(), place
    return [*between, rendered[end:]], order


def _read_along(text: str, at: int, order: Sequence[Said], behind: Sequence[str]) -> dict[Said, Characters] | None:
    """What was said, where each text is followed by what the template writes `behind` it.

    Of the last that need not be all, since templates end as they are told to: the form counts that most of it follows.
    """
    found: dict[Said, Characters] = {}
    for said, literal in zip(order, behind, strict=True):
        stops = [at + len(form) for form in said.forms if text.startswith(form, at)]
        if said is order[-1]:
            stops = sorted(stops, key=lambda stop: -_common(text[stop:], literal))
            fits = stops and (_common(text[stops[0] :], literal) > 0 or text[stops[0] :] == literal)
            stops = stops[:1] if fits else []
        else:
            stops = [stop for stop in stops if text.startswith(literal, stop)]
        if not stops:
            return None
        found[said] = at, stops[0]
        at = stops[0] + len(literal)
    return found


def _common(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next(
        (at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), min(len(text), len(other))
    )


def _by_order(text: str, every: Sequence[Said], mine: Sequence[Said]) -> dict[Said, Characters]:
    """What was said, found one after the other, from the front and from the back alike."""
    first, last = _forward(text, every), _backward(text, every)
    for said in mine:
        if said in first and said in last and first[said] != last[said]:
            raise NowhereError(
                "role",
                f"what messages[{said.message}] says, {shown(said.text)}, stands in the prompt more than once, and "
                'what the template wrote cannot be told from it: select it by {"text": ..., "occurrence": ...}',
            )
    return {said: first[said] for said in mine if said in first and said in last}


def _forward(text: str, every: Sequence[Said]) -> dict[Said, Characters]:
    found: dict[Said, Characters] = {}
    at = 0
    for said in every:
        for form in said.visible_forms:
            if (place := text.find(form, at)) >= 0:
                found[said] = place, (at := place + len(form))
                break
    return found


def _backward(text: str, every: Sequence[Said]) -> dict[Said, Characters]:
    found: dict[Said, Characters] = {}
    at = len(text)
    for said in reversed(every):
        for form in said.visible_forms:
            if (place := text.rfind(form, 0, at)) >= 0:
                found[said] = place, place + len(form)
                at = place
                break
    return found
