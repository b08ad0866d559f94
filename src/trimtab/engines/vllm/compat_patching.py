"""How a patch is put into vLLM's front end.

Each patch says why it exists and until when, checks the signature of what it replaces, is marked on its target, and is
applied once. Where vLLM is not what a patch was written for, the patch is left out and noted in `problems`: without
steering vLLM runs on, with steering it does not start.
"""

import importlib
import inspect
from typing import Any

_MARK = "__trimtab_patch__"

problems: list[str] = []  # what this vLLM lacks, or has in another form


def find(module: str, name: str, *, required: bool = True) -> Any:
    """A class of vLLM; None if this version has none, which is noted if every version known to us has it."""
    try:
        found = getattr(importlib.import_module(module), name, None)
        problem = f"{module}.{name} is gone"
    except ModuleNotFoundError as error:
        found, problem = None, f"{module} cannot be imported: {error}"
    if found is None and required and problem not in problems:
        problems.append(problem)
    return found


def take(owner: Any, name: str, first: list[str]) -> Any:
    """`owner.name` if it is to be replaced: None if it is ours already, or takes other parameters, which is noted."""
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return None
    where = f"{owner.__name__}.{name}"
    found = None if original is None else list(inspect.signature(original).parameters)
    if found is None or found[: len(first)] != first:
        problem = f"{where} is gone" if found is None else f"{where} takes {found}, not {first}, ..."
        if problem not in problems:
            problems.append(problem)
        return None
    return original


def put(owner: Any, name: str, replacement: Any) -> None:
    """Put `replacement` in the place of what `take` gave."""
    setattr(getattr(replacement, "__func__", replacement), _MARK, True)
    setattr(owner, name, replacement)
