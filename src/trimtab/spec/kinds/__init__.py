"""The kinds of intervention, one file each. A new kind is a subclass of `Intervention`, listed in `KINDS`."""

from trimtab.spec.kinds.add import Add
from trimtab.spec.kinds.intervention import Intervention

KINDS: tuple[type[Intervention], ...] = (Add,)

__all__ = ["KINDS", "Add", "Intervention"]
