"""The kinds of intervention, one file each. A file with a subclass of `Step` is a kind (docs/kinds.md)."""

import importlib
import pkgutil

from trimtab.spec.kinds.add import Add
from trimtab.spec.kinds.intervention import Intervention, Step


def _kinds() -> tuple[type[Step], ...]:
    """The subclasses of `Step` in the files of this folder, in the order of their names: `add` first."""
    found: dict[type[Step], None] = {Add: None}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        for value in vars(importlib.import_module(f"{__name__}.{module}")).values():
            if isinstance(value, type) and issubclass(value, Step) and value not in (Step, Intervention):
                found[value] = None
    return tuple(found)


KINDS = _kinds()

__all__ = ["KINDS", "Add", "Intervention", "Step"]
