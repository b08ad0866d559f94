"""The one machine by which vLLM is changed, and the list of what did not fit.

A patch says why it exists and until when (the docstring of the function that makes it), names the parameters that it
relies on, is marked on its target, and is applied once: when vLLM imports the module, or at once where it has. So
nothing is imported early, and each process pays for what it uses. Whatever goes wrong becomes a line in `problems`:
vLLM without steering runs on as if trimtab were not installed, and an engine with steering does not start.
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from trimtab.errors import SteeringError

logger = logging.getLogger("vllm.trimtab")

_MARK = "__trimtab_patch__"

problems: list[str] = []  # what this vLLM lacks, or has in another form

_waiting: dict[str, dict[str, Callable[[ModuleType], None]]] = {}  # module -> what -> how: for when it is imported


@dataclass(frozen=True)
class Patch:
    """One change to vLLM. `make` takes what is there and returns what replaces it, for a class or a module."""

    module: str
    target: str  # within the module: "EngineCore.preprocess_add_request"
    first: tuple[str, ...]  # the parameters that it relies on, from the first one on
    make: Callable[[Any], Any]
    exact: bool = False  # whether there may be no further parameters
    optional: bool = False  # whether some versions have nothing of that name there

    @property
    def why(self) -> str:
        """Why it exists and until when."""
        return inspect.getdoc(self.make) or ""

    def apply(self, module: ModuleType) -> None:
        """Put it into `module`; what does not fit is noted."""
        owner_name, _, name = self.target.rpartition(".")
        owner = getattr(module, owner_name, None) if owner_name else module
        if self.optional and not hasattr(owner, name):
            return
        if owner is None:
            note(f"{self.module}.{owner_name} is gone")
        elif (original := take(owner, name, self.first, exact=self.exact)) is not None:
            put(owner, name, self.make(original))


def patch(
    module: str, target: str, *first: str, table: list[Patch], exact: bool = False
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Make the decorated function a row of `table`: it takes what `target` in `module` is, and returns its replacement.

    Its docstring says why the patch exists and until when; `first` are the parameters that it relies on.
    """

    def row(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        table.append(Patch(module, target, first, make, exact))
        return make

    return row


def install_table(table: Sequence[Patch]) -> None:
    """Apply each patch as soon as its module is imported. A second call does nothing."""
    for row in table:
        when_imported(row.module, row.target, row.apply)


def when_imported(module: str, what: str, apply: Callable[[ModuleType], None]) -> None:
    """Call `apply` once `module` is imported, at once if it is. It never harms the import: what it raises is noted."""
    found = sys.modules.get(module)
    if found is not None and not getattr(getattr(found, "__spec__", None), "_initializing", False):
        guarded(f"{module}: {what}", apply, found)
        return
    if not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchingFinder())
    _waiting.setdefault(module, {})[what] = apply


def guarded(what: str, apply: Callable[..., None], *args: Any) -> None:
    """`apply(*args)`; what it raises is noted, since an engine that is not steered has nothing to do with it."""
    try:
        apply(*args)
    except Exception as error:
        note(f"{what} could not be patched ({type(error).__name__}: {error})")


def note(problem: str) -> None:
    """Add a line to `problems`, once."""
    if problem not in problems:
        problems.append(problem)
        logger.debug("Of use only with steering: trimtab does not know this vLLM: %s", problem)


def is_patched(target: Any) -> bool:
    """Whether `target` is one of our replacements, or stands before one."""
    return bool(getattr(target, _MARK, False))


class Need(enum.Enum):
    """What it means for a steered engine that a module of vLLM cannot be imported."""

    ALWAYS = "every version has it"
    BY_VERSION = "some versions have it"
    LIBRARIES = "a server has it only where the libraries for it are installed"


def require(modules: Mapping[str, Need]) -> None:
    """Import `modules`, so that their patches are applied, and raise `SteeringError` if there is a problem.

    A part whose libraries are missing is none: the server has no such part either.
    """
    for module, need in modules.items():
        try:
            _apply_waiting(importlib.import_module(module), module)  # again: its import may have begun before our watch
        except Exception as error:
            if not _excused(error, need, module):
                note(f"{module} cannot be imported ({type(error).__name__}: {error})")
    require_known()


def require_known() -> None:
    """Raise `SteeringError` if there is a problem."""
    if problems:
        raise SteeringError("steering", f"trimtab does not know this vLLM: {'; '.join(problems)}")


def _excused(error: Exception, need: Need, module: str) -> bool:
    if not isinstance(error, ImportError) or not error.name:
        return need is Need.LIBRARIES
    if error.name.split(".")[0] != "vllm":
        return True  # a library that is not installed
    return need is Need.BY_VERSION and (module + ".").startswith(error.name + ".")


def take(owner: Any, name: str, first: Sequence[str], *, exact: bool = False) -> Any:
    """`owner.name` if it is to be replaced: None if it is ours already, or takes other parameters, which is noted."""
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return None
    if (problem := _mismatch(owner, name, first, exact=exact)) is not None:
        note(problem)
        return None
    return original


def put(owner: Any, name: str, replacement: Any) -> None:
    """Put `replacement` in the place of what `take` gave."""
    setattr(getattr(replacement, "__func__", replacement), _MARK, True)
    setattr(owner, name, replacement)


def wrap_method(owner: Any, name: str, first: Sequence[str], wrap: Callable[[Any], Any]) -> None:
    """Replace a method of one object. Raises `SteeringError` unless its parameters start with `first`."""
    if (problem := _mismatch(owner, name, first, exact=False)) is not None:
        raise SteeringError("steering", f"trimtab does not know this vLLM: {problem}")
    setattr(owner, name, wrap(getattr(owner, name)))


def _mismatch(owner: Any, name: str, first: Sequence[str], *, exact: bool) -> str | None:
    where = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    target = getattr(owner, name, None)
    if target is None:
        return f"{where} is gone"
    found = list(inspect.signature(target).parameters)
    if found[: len(first)] != list(first) or (exact and len(found) != len(first)):
        return f"{where} takes ({', '.join(found)}), not ({', '.join(first)}{'' if exact else ', ...'})"
    return None


def _apply_waiting(module: ModuleType, name: str) -> None:
    for what, apply in _waiting.get(name, {}).items():
        guarded(f"{name}: {what}", apply, module)


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: hands on what the others find, and patches the modules it knows once they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            _apply_after_execution(spec.loader, fullname)
        return spec


def _apply_after_execution(loader: Any, name: str) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _apply_waiting(module, name)

    try:
        loader.exec_module = exec_module
    except Exception as error:  # a loader of another kind: the module is imported as it is
        note(f"{name} cannot be watched ({type(error).__name__}: {error})")
