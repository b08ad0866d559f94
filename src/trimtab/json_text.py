"""Reading JSON that others wrote: one kind of error for all that can be wrong with it, and nothing of it lost."""

import json
from typing import Any

from trimtab.errors import SteeringError


def read_json(text: str | bytes) -> Any:
    """The value of a JSON text, UTF-8 where it is bytes.

    Raises `SteeringError` for what is no JSON, for a key that stands twice in one object (of which Python would keep
    the last), and for nesting that is too deep to read.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")  # json.loads would take it for UTF-16 or UTF-32 where it holds zeros
        return json.loads(text, object_pairs_hook=_object_without_duplicates)
    except SteeringError:
        raise
    except UnicodeDecodeError:
        raise SteeringError("", "is not JSON: it is not text in UTF-8") from None
    except RecursionError:
        raise SteeringError("", "is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # bad syntax, numbers of 10,000 digits
        raise SteeringError("", f"is not JSON ({error})"[:200]) from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise SteeringError("", f"the key {twice!r:.80} is given twice in one object")
    return result
