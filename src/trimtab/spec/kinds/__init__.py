"""The kinds of intervention, one file each. A file with a subclass of `Step` is a kind (docs/kinds.md)."""

import importlib
import pkgutil

from trimtab.responses import KEEP_NORM
from trimtab.spec.kinds.add import Add
from trimtab.spec.kinds.intervention import Intervention, Needs, Step


def _kinds() -> tuple[type[Step], ...]:
    """The subclasses of `Step` in the files of this folder, in the order of their names: `add` first."""
    found: dict[type[Step], None] = {Add: None}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        for value in vars(importlib.import_module(f"{__name__}.{module}")).values():
            if isinstance(value, type) and issubclass(value, Step) and value not in (Step, Intervention):
                found[value] = None
    return tuple(found)


KINDS = _kinds()

DECLARED: dict[str, Needs] = {
    **{name: needs for kind in KINDS[1:] + KINDS[:1] for name, needs in kind.declared().items()},
    "keep_norm": Needs((KEEP_NORM.name,)),  # of a spec, beside its interventions
}
"""All that an engine can be started for, beside what is always served, by the name that its settings give it."""

__all__ = ["DECLARED", "KINDS", "Add", "Intervention", "Needs", "Step"]
