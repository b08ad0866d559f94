"""The kinds of intervention, one file each. A file with a subclass of `Intervention` is a kind (docs/kinds.md)."""

import importlib
import pkgutil

from trimtab.spec.kinds.add import Add
from trimtab.spec.kinds.intervention import Intervention


def _kinds() -> tuple[type[Intervention], ...]:
    """The subclasses of `Intervention` in the files of this folder, in the order of their names: `add` first."""
    found: dict[type[Intervention], None] = {Add: None}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        for value in vars(importlib.import_module(f"{__name__}.{module}")).values():
            if isinstance(value, type) and issubclass(value, Intervention) and value is not Intervention:
                found[value] = None
    return tuple(found)


KINDS = _kinds()

__all__ = ["KINDS", "Add", "Intervention"]
