"""Where the body of a request asks for steering. A body is read once, and each of its keys is seen while it is.

What asks is a key, wherever a server might look for its options. Text is never searched, nor is what users or models
wrote as data: schemas, definitions and arguments of tools, documents. So a prompt may speak of steering and a tool may
have a parameter of that name.
"""

import json
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from trimtab.engines.vllm.frontend.admission import FIELD
from trimtab.spec.faults import join

# What a name for steering has in it: our words, and those of other systems. And whole names: the spec's own first key.
WORDS = ("steer", "trimtab", "hotwire", "controlvector", "activationaddition")
OTHER_NAMES = frozenset({"cvec", "applyhooks", "intervention", "interventions"})

# Objects whose keys are a user's data or a model's, not options: at the top of a body, and the parts of these deeper
# within. Schemas stand in options, which are searched up to there.
DATA = frozenset({"documents", "functions", "guided_json", "tools", "ec_transfer_params", "kv_transfer_params"})
INNER_DATA = DATA | {"arguments", "parameters", "variables"}
INNER_DATA |= {"$defs", "definitions", "input_schema", "json", "json_schema", "properties", "schema"}

_TOPS = ("", "body")  # of a request, and of a line of a batch

# Objects in which users choose names. In arguments of their templates and processors our own name means us, and names
# like it only with an object behind them; in records, of which a server reads nothing, only such an object does.
OWN_NAMES = {
    "chat_template_kwargs": "arguments",
    "media_io_kwargs": "arguments",
    "mm_processor_kwargs": "arguments",
    "metadata": "records",
}

# Options that some clients hand on as JSON text; forms have no other way.
AS_TEXT = frozenset({"chat_template_kwargs", "extra_args", "extra_body", "metadata", "sampling_params", "vllm_xargs"})

_LONGEST_NAME = 64

_harmless: set[str] = set()  # keys seen before that ask for nothing: nearly all, so that a look at an object is short

_MOST_HARMLESS = 8192


class Ask(NamedTuple):
    """One request for steering: the path of the key that makes it, what stands there, and whether that key, or one on
    the way to it, is given twice in its object, so that a reader of JSON may see either."""

    place: str
    value: Any
    twice: bool


class Body:
    """A parsed body. `asks` finds what in it asks for steering."""

    def __init__(self, value: Any) -> None:
        """Take a body that others have parsed; what it repeated is lost then, and `read` is to be preferred."""
        self.value = value
        self._suspect = True
        # Objects that repeat a key, by their id, each with all of its pairs.
        self._repeated: dict[int, tuple[Any, list[tuple[str, Any]]]] = {}

    @classmethod
    def read(cls, text: str | bytes) -> "Body":
        """Parse JSON. Raises what `json.loads` raises: `ValueError`, and `RecursionError` for deep nesting."""
        body = cls(None)
        body._suspect = False
        body.value = json.loads(text, object_pairs_hook=body._object)
        return body

    @classmethod
    def of_form(cls, fields: Iterable[tuple[str, Any]]) -> "Body":
        """The body that the fields of a form amount to."""
        body = cls(None)
        body.value = body._object(list(fields))
        return body

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            self._repeated[id(made)] = made, pairs
        if not _harmless.issuperset(made):
            self._look_at(made)
        return made

    def _look_at(self, made: dict[str, Any]) -> None:
        for key in made:
            if names_steering(key) or key in AS_TEXT:
                self._suspect |= names_steering(key) or isinstance(made[key], str)
            elif len(key) <= _LONGEST_NAME:
                if len(_harmless) >= _MOST_HARMLESS:  # someone sends keys without end
                    _harmless.clear()
                _harmless.add(key)

    def asks(self, *, ours_alone: bool = False) -> Iterator[Ask]:
        """Each key that asks for steering and is not null, those at the top first.

        `ours_alone` leaves out names that are not ours, which other plugins may serve.
        """
        asks = _is_ours if ours_alone else _asks
        todo = deque([("", self.value, "", False)] if self._suspect else [])
        while todo:
            place, node, named, twice = todo.popleft()
            if isinstance(node, list):  # token ids and embeddings are long
                inner = ((i, item) for i, item in enumerate(node) if isinstance(item, dict | list))
                todo.extend((f"{place}[{i}]", item, named, twice) for i, item in inner)
            elif isinstance(node, dict):
                data = DATA if place in _TOPS else INNER_DATA
                for key, value, repeated in self._items(node):
                    inside, doubled = join(place, f"{key!s:.80}"), twice or repeated
                    if isinstance(key, str) and asks(key, value, named):
                        if value is not None or doubled:
                            yield Ask(inside, value, doubled)
                    elif key not in data and not (key == "input" and isinstance(value, dict)):
                        todo.append((inside, self._opened(key, value), named or OWN_NAMES.get(key, ""), doubled))

    def holders(self, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects on the way to what `asks` found at `place`, from the body on, each with its own place."""
        node, here = self.value, ""
        for key in place.split("."):
            yield here, node
            node, here = self._opened(key, node[key]), join(here, key)

    def key_given_twice(self, node: Any) -> str | None:
        """A key that some object within `node` repeats; None if there is none."""
        todo = [node] if self._repeated else []
        while todo:
            node = todo.pop()
            if isinstance(node, dict):
                if (twice := next((key for key, _, repeated in self._items(node) if repeated), None)) is not None:
                    return twice
                todo.extend(node.values())
            elif isinstance(node, list):
                todo.extend(node)
        return None

    def _items(self, node: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
        """The pairs of an object, those that a repeated key hides too, and whether each key is a repeated one."""
        if id(node) not in self._repeated:
            yield from ((key, value, False) for key, value in node.items())
            return
        _, pairs = self._repeated[id(node)]
        counts = Counter(key for key, _ in pairs)
        yield from ((key, value, counts[key] > 1) for key, value in pairs)

    def _opened(self, key: str, value: Any) -> Any:
        if key in AS_TEXT and isinstance(value, str):
            try:
                inner = Body.read(value)
            except (ValueError, RecursionError):
                return None  # vLLM refuses it, or never reads it
            self._repeated |= inner._repeated
            return inner.value
        return value


def names_steering(key: str) -> bool:
    """Whether a key is a name for steering: ours, misspelt by one letter, or one that others use for theirs."""
    if len(key) > _LONGEST_NAME or key in _harmless:
        return False
    name = unicodedata.normalize("NFKC", key).casefold()
    letters = "".join(filter(str.isalnum, name))
    if letters in OTHER_NAMES or any(word in letters for word in WORDS):
        return True
    return any(map(_is_nearly_ours, (letters, *_words(name))))


def _asks(key: str, value: Any, named: str) -> bool:
    if not names_steering(key):
        return False
    return not named or _is_an_object(value) or (named == "arguments" and _is_nearly_ours(key.casefold()))


def _is_ours(key: str, value: Any, named: str) -> bool:
    return key.casefold() == FIELD and not named


def _is_an_object(value: Any) -> bool:
    return isinstance(value, (Mapping, list)) or (isinstance(value, str) and value.lstrip()[:1] in ("{", "["))


def _words(name: str) -> list[str]:
    return re.split(r"[\W_]+", name)


def _is_nearly_ours(name: str) -> bool:
    return _NEARLY_OURS.fullmatch(name) is not None


def _misspellings(name: str) -> Iterator[str]:
    """Patterns of `name` with a letter added, replaced or left out, or with two neighbours exchanged."""
    for index in range(len(name) + 1):
        before, after = name[:index], name[index:]
        yield from (before + "." + after, before + "." + after[1:], before + after[1:])
        yield before + after[1:2] + after[:1] + after[2:]


_NEARLY_OURS = re.compile("|".join(_misspellings(FIELD)))
