"""Small turns of phrase that the messages of errors share."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice

_NAMES_COMPARED = 2000  # of a large catalogue, so that a misspelt name stays cheap to refuse


def summary(items: Sequence[object], most: int = 8) -> str:
    """A short listing for messages: the first few and how many more."""
    head = ", ".join(str(item) for item in items[:most])
    return f"{head} and {len(items) - most} more" if len(items) > most else head


def with_suggestions(name: object, known: Iterable[str]) -> str:
    """` (did you mean ...?)` for a misspelt name, or nothing where no known name is close."""
    some = list(islice(known, _NAMES_COMPARED))
    close = get_close_matches(name, some, n=3, cutoff=0.6) if isinstance(name, str) and len(name) <= 200 else []
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def shown(value: object) -> str:
    """A value as a message quotes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with more digits than Python prints, a list within 1,000 others
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
