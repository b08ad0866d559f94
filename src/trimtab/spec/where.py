"""`where` of an intervention as a request writes it: which tokens of prompt and answer it acts on.

    {"prompt": "all" | places, "answer": "all" | ranges, "section": ..., "after": ..., "until": ..., "tokens": [...],
     "special_tokens": false, "not": {the same, without "not"}}

`prompt` and `answer` say which positions, joined; the other keys narrow that, and `not` is taken off last. What each
key means is in docs/where.md. Here stands what can be refused by looking at a request alone; what becomes of it in a
prompt is in `trimtab.spec.selected`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from trimtab.errors import SteeringError
from trimtab.spec.base import Model, keys_are_text
from trimtab.spec.places import (
    Place,
    Range,
    RolePlace,
    TextPlace,
    TokenRun,
    answer_places,
    prompt_places,
    single_tokens,
    token_run,
)
from trimtab.wording import shown, with_suggestions

SectionName = Literal["thinking", "response"]
SECTIONS: tuple[SectionName, ...] = get_args(SectionName)
OF_THE_ANSWER = ("section", "after", "until")
"""Keys that speak of the answer's tokens alone."""
CONDITIONS = (*OF_THE_ANSWER, "tokens", "special_tokens")
"""Keys that ask something of each token."""


def _as_json(value: Any) -> Any:
    if isinstance(value, Model):
        return value.model_dump(mode="json")
    return [_as_json(one) for one in value] if isinstance(value, tuple) else value


def _read_by(read: Callable[[Any], Any]) -> tuple[Any, ...]:
    """What a field is annotated with: null is as good as no key."""
    validator = PlainValidator(lambda value: None if value is None else read(value))
    return validator, PlainSerializer(_as_json, return_type=Any), WithJsonSchema({})


_RunOfTokens = Annotated[TokenRun | None, *_read_by(token_run)]


class _Given(Model):
    """An object that is told as it was given."""

    model_config = ConfigDict(serialize_by_alias=True)

    @model_serializer(mode="wrap")
    def _dumped(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = plain(self)
        return {key: value for key, value in dumped.items() if value is not None}


class Section(_Given):
    """A part of the answer that a model marks by tags: what lies between `start` and `end`, or what does not.

    Without tags of its own it is told by those of the model.
    """

    name: SectionName
    start: _RunOfTokens = None
    end: _RunOfTokens = None

    @model_validator(mode="after")
    def _two_tags(self) -> Self:
        for absent, given in (("start", self.end), ("end", self.start)):
            if given is not None and getattr(self, absent) is None:
                raise SteeringError(absent, "is required: a section has two tags, or those of the model")
        if self.start is not None and self.start == self.end:
            raise SteeringError("end", f"got {shown(self.end)}, as for `start`: nothing would tell where it ends")
        return self


def _section(value: Any) -> Section:
    if isinstance(value, Section):
        return value
    if isinstance(value, Mapping):
        return Section(**keys_are_text(value))
    if not isinstance(value, str) or value not in SECTIONS:
        said = f"got {shown(value)}{with_suggestions(value, SECTIONS)}, want {' or '.join(map(repr, SECTIONS))}, or an "
        raise SteeringError("", f"{said}object with `name`, `start` and `end`")
    return Section(name=value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not value


def _selects(value: Any) -> bool:
    return value is not None and not _is_empty(value)


class Selection(_Given):
    """Some tokens of a request: positions of its prompt and answer, and what narrows them."""

    prompt: Annotated[str | Place | tuple[Place, ...] | None, *_read_by(prompt_places)] = None
    answer: Annotated[str | tuple[Place, ...] | None, *_read_by(answer_places)] = None
    section: Annotated[Section | None, *_read_by(_section)] = None
    after: _RunOfTokens = None
    until: _RunOfTokens = None
    tokens: Annotated[tuple[int | str, ...] | None, *_read_by(single_tokens)] = None
    special_tokens: Annotated[bool, Field(strict=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_of_one_part(cls, given: Any) -> Any:
        """An empty list is nothing of one part, as receipts tell it, where the other is there: as good as no key."""
        for part, other in (("prompt", "answer"), ("answer", "prompt")):
            if isinstance(given, Mapping) and _is_empty(given.get(part)) and _selects(given.get(other)):
                return {key: value for key, value in given.items() if key != part}
        return given

    @model_validator(mode="after")
    def _answer_alone(self) -> Self:
        for key in OF_THE_ANSWER:
            if self.prompt is not None and getattr(self, key) is not None:
                said = "is about the answer's tokens, so it cannot stand beside `prompt`: give two interventions"
                raise SteeringError(key, f"{said}, one with `prompt` and one with `{key}`")
        return self

    @property
    def places_in_prompt(self) -> Iterator[tuple[str, Place]]:
        """Ranges, texts and roles, with the field at which each stands."""
        if isinstance(self.prompt, (Range, TextPlace, RolePlace)):
            yield "prompt", self.prompt
        elif self.prompt is not None and not isinstance(self.prompt, str):
            yield from ((f"prompt[{index}]", place) for index, place in enumerate(self.prompt))

    @property
    def places(self) -> Iterator[Place]:
        """All ranges, texts and roles."""
        yield from (place for _, place in self.places_in_prompt)
        if self.answer is not None and not isinstance(self.answer, str):
            yield from self.answer

    @property
    def has_prompt(self) -> bool:
        """Whether it may hold tokens of the prompt."""
        if self.prompt is None and self.answer is None:
            return all(getattr(self, key) is None for key in OF_THE_ANSWER)
        return self.prompt is not None

    @property
    def has_answer(self) -> bool:
        """Whether it may hold tokens of the answer."""
        return self.answer is not None or self.prompt is None


def _selection(value: Any) -> Selection:
    if isinstance(value, Selection) and not isinstance(value, Where):
        return value
    if not isinstance(value, Mapping):
        raise SteeringError("", f"got {shown(value)}, want an object of the keys that stand beside `not`")
    if "not" in value:
        raise SteeringError("not", "cannot stand within `not`: what it would leave, say by the keys beside it")
    return Selection(**keys_are_text(value))


class Where(Selection):
    """The tokens that an intervention acts on: a selection, less another."""

    excluded: Annotated[Selection | None, *_read_by(_selection), Field(alias="not")] = None

    @property
    def conditions_told(self) -> str:
        """What to say where its conditions cannot hold together."""
        names = [f"`{key}`" for key in CONDITIONS if getattr(self, key) is not None]
        asked = [f"all that {' and '.join(names)} {'ask' if len(names) > 1 else 'asks'} for"] if names else []
        left = [] if self.excluded is None else ["left by `not`"]
        return f"no token of any answer is {' and '.join([*asked, *left])}"

    @property
    def all_in_prompt(self) -> Iterator[tuple[str, Place]]:
        """Those in the prompt with their fields, those of `not` too."""
        yield from self.places_in_prompt
        if self.excluded is not None:
            yield from ((f"not.{field}", place) for field, place in self.excluded.places_in_prompt)

    @property
    def all_places(self) -> Iterator[Place]:
        """Those of `not` too."""
        yield from self.places
        if self.excluded is not None:
            yield from self.excluded.places


def read(value: Any) -> Where | None:
    """What an intervention's key `where` says; None is none. Raises `SteeringError`."""
    if value is None or isinstance(value, Where):
        return value
    if not isinstance(value, Mapping):
        raise SteeringError("", f'got {shown(value)}, want an object, as {{"answer": [[0, 16]]}}')
    return Where(**keys_are_text(value))


WhereField = Annotated[Where | None, BeforeValidator(read)]
"""What may say where an intervention acts."""
