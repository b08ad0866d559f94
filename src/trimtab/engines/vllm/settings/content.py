"""The content of the files in an engine's settings: read once in each process, and the same in all of them.

A request refers to start-up content by digest, and the front end, the engine core and every worker compute with the
numbers, so each process reads the files. What an engine's configuration was stamped with is what they must hold.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.errors import SteeringError

Content = TypeVar("Content")

Stamp = Mapping[str, Any] | None


def loaded(files: Mapping[str, str], load: Callable[[str], Content], what: str, stamp: Stamp) -> dict[str, Content]:
    """What `load` makes of `files`, by name. Raises `SteeringError` naming a file that is bad, or not as stamped."""
    contents: dict[str, Content] = {}
    for name, path in files.items():
        field = f"{SETTINGS_KEY}.{what}s.{name}"
        content: Any = load_one(path, load, field)
        if stamp is not None:
            require_same(field, f"{path} holds another {what}", content.digest, stamp.get(f"{what}s", {}).get(name))
        contents[name] = content
    return contents


def load_one(path: str, load: Callable[[str], Content], field: str) -> Content:
    """What `load` makes of a file. Raises `SteeringError` at `field`, naming the file, where that is bad."""
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise SteeringError(field, f"{path} cannot be loaded: {error}") from error


def require_same(field: str, fault: str, digest: bytes, expected: str | None) -> None:
    """Raise `SteeringError` where content is not what the engine was configured with, and so not that of others."""
    if digest.hex() != expected:
        raise SteeringError(field, f"{fault} here than where the engine was configured")
