"""A slow and obvious model of `where`: which tokens of a prompt and its answer an intervention acts on.

It reads the JSON of a request, goes through the tokens one by one, and shares no code with the library.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Conversation:
    """All that `where` may be about. What a case does not use can be left out.

    `characters` are the first and the one behind the last, in `text`, of each token of the prompt; `said` are who said
    what, from which character of `text` to before which. `forms` are the ways in which a text may be written as tokens.
    `thinks` says how an answer begins where the prompt has no tag.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    text: str = ""
    characters: Sequence[tuple[int, int]] = ()
    said: Sequence[tuple[str, int, int]] = ()
    special: frozenset[int] = frozenset()
    starts: Sequence[Sequence[int]] = ()
    ends: Sequence[Sequence[int]] = ()
    thinks: bool = False
    forms: Callable[[str], Sequence[Sequence[int]]] = field(default=lambda text: [])

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]

    def runs(self, given: str | Sequence[int]) -> Sequence[Sequence[int]]:
        """The runs of ids that a text or some ids are."""
        return self.forms(given) if isinstance(given, str) else [given]


def acting(interventions: Sequence[Mapping[str, Any]], told: Conversation) -> list[set[int]]:
    """For each token of prompt and answer the interventions that act on it, by their indices."""
    each = [selected(where_of(one), told) for one in interventions]
    return [{index for index, some in enumerate(each) if some[at]} for at in range(len(told.tokens))]


def where_of(intervention: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an intervention says, by whichever key."""
    short: dict[str, dict[str, Any]] = {"all": {}, "prefill": {"prompt": "all"}, "decode": {"answer": "all"}}
    return intervention.get("where") or short[intervention.get("phase", "all")]


def selected(where: Mapping[str, Any], told: Conversation) -> list[bool]:
    """For each token of prompt and answer whether it is selected."""
    without = where.get("not")
    return [
        _is_in(where, at, told) and not (without is not None and _is_in(without, at, told))
        for at in range(len(told.tokens))
    ]


def _is_in(where: Mapping[str, Any], at: int, told: Conversation) -> bool:
    return _is_placed(where, at, told) and _is_of_section(where, at, told) and _is_such(where, at, told)


def _is_placed(where: Mapping[str, Any], at: int, told: Conversation) -> bool:
    in_prompt = at < len(told.prompt)
    if "prompt" not in where and "answer" not in where:
        return not in_prompt or not ({"section", "after", "until"} & set(where))
    if in_prompt:
        return "prompt" in where and _is_in_prompt(where["prompt"], at, told)
    if "answer" not in where:
        return False
    place = at - len(told.prompt)
    if where["answer"] == "all":
        return True
    return any((first or 0) <= place and (stop is None or place < stop) for first, stop in where["answer"])


def _is_in_prompt(given: Any, at: int, told: Conversation) -> bool:
    if given == "all":
        return True
    if isinstance(given, list):
        return any(_is_at(place, at, told) for place in given)
    return _is_at(given, at, told)


def _is_at(place: Any, at: int, told: Conversation) -> bool:
    if isinstance(place, list):
        first, stop = (end if end is None or end >= 0 else end + len(told.prompt) for end in place)
        return (first is None or at >= first) and (stop is None or at < stop)
    begin, end = told.characters[at]
    return any(begin < stop and end > first for first, stop in places(place, told))


def places(place: Mapping[str, Any], told: Conversation) -> list[tuple[int, int]]:
    """The characters of a text or of a role."""
    if "role" in place:
        found = [(first, stop) for role, first, stop in told.said if role == place["role"]]
        return found[-1:] if place.get("turns") == "last" else found
    found, at = [], 0
    while at < len(told.text):
        if told.text[at : at + len(place["text"])] == place["text"]:
            found.append((at, at + len(place["text"])))
            at += len(place["text"])
        else:
            at += 1
    which = place.get("occurrence", 0)
    return found if which == "all" else [found[which]]


def _is_of_section(where: Mapping[str, Any], at: int, told: Conversation) -> bool:
    if "section" in where:
        section = where["section"]
        given = section if isinstance(section, Mapping) else {"name": section}
        starts = told.runs(given["start"]) if "start" in given else told.starts
        ends = told.runs(given["end"]) if "end" in given else told.ends
        if _completes(at, starts, 0, told) or _completes(at, ends, 0, told):
            return False
        thinks = _is_open(at, starts, ends, 0, told.thinks and "start" not in given, told)
        if thinks != (given["name"] == "thinking"):
            return False
    if "after" in where or "until" in where:
        first = len(told.prompt)
        opens = told.runs(where["after"]) if "after" in where else []
        closes = told.runs(where["until"]) if "until" in where else []
        if _completes(at, opens, first, told) or _completes(at, closes, first, told):
            return False
        return _is_open(at, opens, closes, first, "after" not in where, told)
    return True


def _is_open(
    at: int,
    opens: Sequence[Sequence[int]],
    closes: Sequence[Sequence[int]],
    first: int,
    otherwise: bool,
    told: Conversation,
) -> bool:
    """What the last of the tokens before `at` that completed a run made of it."""
    for earlier in range(at - 1, first - 1, -1):
        if _completes(earlier, closes, first, told):
            return False
        if _completes(earlier, opens, first, told):
            return True
    return otherwise


def _completes(at: int, runs: Sequence[Sequence[int]], first: int, told: Conversation) -> bool:
    """Whether the token at `at` is the last of a run that begins at `first` or later."""
    begins = [(at + 1 - len(run), list(run)) for run in runs]
    return any(begin >= first and told.tokens[begin : at + 1] == run for begin, run in begins)


def _is_such(where: Mapping[str, Any], at: int, told: Conversation) -> bool:
    token = told.tokens[at]
    if "tokens" in where:
        ids = [one if isinstance(one, int) else told.forms(one)[0][0] for one in where["tokens"]]
        if token not in ids:
            return False
    return "special_tokens" not in where or (token in told.special) == where["special_tokens"]
