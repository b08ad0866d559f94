"""What a `where` selects of one prompt and its answer: positions, and what the answer's own tokens have to say."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from trimtab.errors import SteeringError
from trimtab.program.spans import MOST_ID_RANGES, MOST_SEQUENCES, Atom, Between, IdSet
from trimtab.spec.base import NowhereError, below
from trimtab.spec.intervals import EVERYTHING, OPEN, Intervals, common, joined, less, of_numbers
from trimtab.spec.places import Place, Range, TextPlace
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.where import Section, Selection, Where
from trimtab.wording import summary


class Saying(NamedTuple):
    """What an atom must say of a token."""

    atom: Atom
    yes: bool = True


class Part(NamedTuple):
    """A selection: positions of the prompt, and positions of the answer where its tokens say all of `says`."""

    prompt: Intervals
    answer: Intervals  # counted from the answer's first token
    says: tuple[Saying, ...] = ()


@dataclass(frozen=True)
class Selected:
    """The tokens that an intervention acts on: all of `prompt`; of the answer those of `kept` that are not `excluded`.

    What of `excluded` can be said without the answer's tokens is taken off already.
    """

    prompt: Intervals
    kept: Part
    excluded: Part

    @property
    def atoms(self) -> Iterator[Atom]:
        """All that the answer's tokens are asked."""
        yield from (saying.atom for part in (self.kept, self.excluded) for saying in part.says)


NOTHING = Part((), ())
NOWHERE = Selected((), NOTHING, NOTHING)


def selected(where: Where, prompt: PromptTokens, *, lenient: bool = False) -> Selected:
    """What `where` selects.

    Raises `SteeringError` at its fields: `NowhereError` for texts and roles that this prompt does not have, which one
    that is `lenient` leaves out, and where no token of prompt or answer is selected.
    """
    kept = _part(where, prompt, lenient)
    if not (kept.prompt or kept.answer):
        raise _empty(where, prompt, lenient)
    if where.excluded is None:
        return Selected(kept.prompt, kept, NOTHING)
    with below("not"):
        excluded = _part(where.excluded, prompt, lenient)
    left = kept._replace(prompt=less(kept.prompt, excluded.prompt))
    if not excluded.says:
        left = left._replace(answer=less(kept.answer, excluded.answer))
    if not left.answer:
        left = left._replace(says=())
    if not (excluded.says and common(left.answer, excluded.answer)):
        excluded = NOTHING
    if not (left.prompt or left.answer):
        raise NowhereError("not", f"leaves nothing: {_told(prompt)}, and all that the other keys select is taken off")
    return Selected(left.prompt, left, excluded)


def _part(selection: Selection, prompt: PromptTokens, lenient: bool) -> Part:
    in_prompt = _of_prompt(selection, prompt, lenient) if selection.has_prompt else ()
    in_answer = _of_answer(selection) if selection.has_answer else ()
    says: list[Saying] = []
    if selection.section is not None:
        with below("section"):
            says.append(_section(selection.section, prompt))
    if selection.after is not None or selection.until is not None:
        says.append(_between(selection, prompt))
    answers = bool(in_answer)
    for saying in (_tokens(selection, prompt, answers), _special(selection, prompt, answers)):
        if saying is not None:
            if in_prompt:
                members = prompt.holding(saying.atom) if isinstance(saying.atom, IdSet) else ()
                in_prompt = common(in_prompt, members) if saying.yes else less(in_prompt, members)
            says.append(saying)
    if any(saying.atom == IdSet(()) for saying in says):  # no token is one of none
        in_answer = () if any(saying.yes for saying in says if saying.atom == IdSet(())) else in_answer
        says = [saying for saying in says if saying.atom != IdSet(())]
    return Part(in_prompt, in_answer, tuple(dict.fromkeys(says)) if in_answer else ())


def _of_prompt(selection: Selection, prompt: PromptTokens, lenient: bool) -> Intervals:
    if selection.prompt is None or isinstance(selection.prompt, str):
        return ((0, prompt.length),)
    found: list[tuple[int, int]] = []
    for field, place in selection.places_in_prompt:
        try:
            with below(field):
                found.extend(_placed(place, prompt))
        except NowhereError:
            if not lenient:
                raise
    return joined(found)


def _placed(place: Place, prompt: PromptTokens) -> Intervals:
    if isinstance(place, Range):
        first, stop = (_from_start(end, prompt.length) for end in place)
        return ((first or 0, prompt.length if stop is None else min(stop, prompt.length)),)
    if isinstance(place, TextPlace):
        return prompt.occurrences(place.text, place.occurrence)
    return prompt.spoken(place.role, last=place.turns == "last")


def _from_start(end: int | None, length: int) -> int | None:
    return end if end is None or end >= 0 else max(0, end + length)


def _of_answer(selection: Selection) -> Intervals:
    given = selection.answer
    if given is None or isinstance(given, str):
        return EVERYTHING
    ranges = (place for place in given if isinstance(place, Range))
    return joined((first or 0, OPEN if stop is None else stop) for first, stop in ranges)


def _section(section: Section, prompt: PromptTokens) -> Saying:
    """Thinking lies between its tags, the response behind the last and before the first."""
    if section.start is None or section.end is None:
        starts, ends = prompt.thinking()
        opens = prompt.tags is not None and prompt.tags.opens
    else:
        starts, ends, opens = (section.start,), (section.end,), False
    tags: list[tuple[tuple[int, ...], ...]] = []
    for field, some in (("start", starts), ("end", ends)):
        with below(field if section.start is not None else ""):
            tags.append(tuple(dict.fromkeys(run for tag in some for run in prompt.runs_of(tag))))
    for some in tags:
        if len(some) > MOST_SEQUENCES:
            said = (
                f"its tags can be written as tokens in {len(some)} ways, of which at most {MOST_SEQUENCES} are served"
            )
            raise SteeringError("", f"{said}: give ids of tokens")
    begin, end = tags
    for one, other in product(begin, end):
        if one[-len(other) :] == other or other[-len(one) :] == one:
            said = f"one tag ends with the other, as tokens: start {list(one)}, end {list(other)}"
            raise SteeringError("", f"{said}; give tags of which none ends with the other")
    thinks = prompt.ends_within(starts, ends, opens)
    if section.name == "thinking":
        return Saying(Between(begin, end, is_open=thinks, looks_back=True))
    return Saying(Between(end, begin, is_open=not thinks, looks_back=True))


def _between(selection: Selection, prompt: PromptTokens) -> Saying:
    found: list[tuple[tuple[int, ...], ...]] = []
    for field, run in (("after", selection.after), ("until", selection.until)):
        with below(field):
            found.append(() if run is None else prompt.runs_of(run))
    opens, closes = found
    return Saying(Between(opens, closes, is_open=not opens))


def _tokens(selection: Selection, prompt: PromptTokens, answers: bool) -> Saying | None:
    if selection.tokens is None:
        return None
    ids: list[int] = []
    with below("tokens"):
        for index, token in enumerate(selection.tokens):
            with below(f"[{index}]"):
                ids.append(prompt.id_of(token))
        found = IdSet(of_numbers(ids))
        if answers:
            _check_ranges(found)
    return Saying(found)


def _special(selection: Selection, prompt: PromptTokens, answers: bool) -> Saying | None:
    if selection.special_tokens is None:
        return None
    with below("special_tokens"):
        found = prompt.special
        if answers:
            _check_ranges(found)
    return Saying(found, selection.special_tokens)


def _check_ranges(some: IdSet) -> None:
    if (found := len(some.ranges)) > MOST_ID_RANGES:
        said = f"are ids in {found} ranges, of which at most {MOST_ID_RANGES} can be told apart in an answer"
        raise SteeringError("", f"{said}: give fewer, or select them in the prompt alone")


def _empty(where: Where, prompt: PromptTokens, lenient: bool) -> NowhereError:
    """The fault of a selection of nothing, at the key that is to blame."""
    told = _told(prompt)
    if not _of_prompt(where, prompt, lenient):
        given = summary([one.told(prompt.length) for _, one in where.places_in_prompt if isinstance(one, Range)], 4)
        return NowhereError("prompt", f"selects nothing: {told}, at positions from 0, and none of them lies in {given}")
    key = "tokens" if where.tokens is not None else "special_tokens"
    return NowhereError(key, f"selects nothing: {told}, and none that `prompt` selects is such a one")


def _told(prompt: PromptTokens) -> str:
    return f"the prompt has {prompt.length} token{'' if prompt.length == 1 else 's'}"
