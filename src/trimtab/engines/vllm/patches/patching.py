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
from typing import Any, NamedTuple

from trimtab.errors import SteeringError

logger = logging.getLogger("vllm.trimtab")

_MARK = "__trimtab_patch__"

problems: list[str] = []  # what this vLLM lacks, or has in another form

_installed: dict[tuple[str, str], "Patch"] = {}  # by module and target

_waiting: dict[str, dict[str, Callable[[ModuleType], None]]] = {}  # module -> what -> how: for when it is imported


class Need(enum.Enum):
    """What it means for a steered engine that a module of vLLM cannot be imported."""

    ALWAYS = "every version has it"
    BY_VERSION = "some versions have it"
    LIBRARIES = "a server has it only where the libraries for it are installed"


class State(enum.Enum):
    """How a patch stands to the vLLM of this process."""

    APPLIED = "applied"
    READY = "ready"  # it fits: each object gets its own as a steered engine makes it
    WAITING = "waiting"  # for its module
    UNFIT = "does not fit"
    NOT_NEEDED = "not needed"  # this version, or what is installed, has nothing there that could be steered


@dataclass(frozen=True)
class Patch:
    """One change to vLLM. `make` takes what is there and returns what replaces it, in a class, module or object."""

    module: str
    target: str  # within the module: "EngineCore.preprocess_add_request"
    first: tuple[str, ...]  # the parameters that it relies on, from the first one on; none for what is not called
    make: Callable[..., Any]
    exact: bool = False  # whether there may be no further parameters
    optional: bool = False  # whether some versions have nothing of that name there
    need: Need = Need.ALWAYS
    at_start: bool = True  # whether a steered engine imports the module when it is configured, or whoever uses it does
    adds: bool = False  # whether there is nothing before, and `make` takes None
    on: str = ""  # the objects of which each gets its own ("each steered worker"); else all share what the class has

    @property
    def why(self) -> str:
        """Why it exists and until when."""
        return inspect.getdoc(self.make) or ""

    @property
    def name(self) -> str:
        """The last part of the target."""
        return self.target.rpartition(".")[2]

    def apply(self, module: ModuleType) -> None:
        """Put it into `module`; what does not fit is noted."""
        owner = self._owner(module)
        if (self.optional and not hasattr(owner, self.name)) or self._is_ours(owner):
            return
        if (problem := self._problem(module)) is not None:
            note(problem)
        else:
            put(owner, self.name, self.make(getattr(owner, self.name, None)))

    def put_on(self, owner: Any, *known: Any) -> None:
        """Put it on one object; `make` is given `known` beside what is there. Raises `SteeringError` if it is unfit."""
        if self.optional and not hasattr(owner, self.name):
            return
        if (problem := _mismatch(owner, self.name, self.first[1:], exact=self.exact)) is not None:
            raise _unknown_vllm([problem])
        setattr(owner, self.name, self.make(getattr(owner, self.name), *known))

    def state(self) -> tuple[State, str]:
        """How it stands to what this process has imported of vLLM, and if it does not fit, the reason."""
        module = sys.modules.get(self.module)
        if module is None:
            return State.WAITING, ""
        owner = self._owner(module)
        if self._is_ours(owner):
            return State.APPLIED, ""
        if self.optional and not _has(owner, self.name):
            return State.NOT_NEEDED, f"this version has no {self.target} there"
        if (problem := self._problem(module)) is not None:
            return State.UNFIT, problem
        if self.on:
            return State.READY, ""
        failed = f"{self.module}: {self.target}"
        return State.UNFIT, next((said for said in problems if said.startswith(failed)), f"{failed} was not patched")

    def _owner(self, module: ModuleType) -> Any:
        owner = self.target.rpartition(".")[0]
        return getattr(module, owner, None) if owner else module

    def _is_ours(self, owner: Any) -> bool:
        return is_patched(getattr(owner, self.name, None))

    def _problem(self, module: ModuleType) -> str | None:
        owner = self._owner(module)
        if owner is None:
            return f"{self.module}.{self.target.rpartition('.')[0]} is gone"
        if self.adds:
            return f"{self.module}.{self.target} is there already" if hasattr(owner, self.name) else None
        if self.on and not self.first:
            return None if _has(owner, self.name) else f"{self.module}.{self.target} is gone"
        return _mismatch(owner, self.name, self.first, exact=self.exact)


def patch(
    module: str, target: str, *first: str, table: list[Patch], **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function a row of `table`: it takes what `target` in `module` is, and returns its replacement.

    Its docstring says why the patch exists and until when; `first` are the parameters that it relies on, `more` further
    fields of `Patch`.
    """

    def row(make: Callable[..., Any]) -> Callable[..., Any]:
        table.append(Patch(module, target, first, make, **more))
        return make

    return row


def install_table(table: Sequence[Patch]) -> None:
    """Apply each patch as soon as its module is imported, but for those on objects. A second call does nothing."""
    for row in table:
        _installed.setdefault((row.module, row.target), row)
        if not row.on:
            when_imported(row.module, row.target, row.apply)


def put_on(owner: Any, table: Sequence[Patch], *known: Any) -> None:
    """Put each patch of `table` on one object. Raises `SteeringError` for one that does not fit."""
    for row in table:
        row.put_on(owner, *known)


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


def require(modules: Mapping[str, Need]) -> None:
    """Import `modules`, so that their patches are applied, and raise `SteeringError` if there is a problem."""
    for module, need in modules.items():
        absence = fetch(module, need)
        if absence is not None and not absence.excused:
            note(absence.reason)
    require_known()


def require_installed() -> None:
    """`require` what installed patches of a starting engine are for."""
    require({row.module: row.need for row in _installed.values() if row.at_start})


def require_known() -> None:
    """Raise `SteeringError` if there is a problem."""
    if problems:
        raise _unknown_vllm(problems)


class Absence(NamedTuple):
    """Why a module is not there, and whether that is no fault: a part that this version or this machine lacks."""

    reason: str
    excused: bool


def fetch(module: str, need: Need) -> Absence | None:
    """Import `module`, so that its patches are applied; None if it is there.

    A part whose libraries are missing is no fault: the server has no such part either.
    """
    try:
        _apply_waiting(importlib.import_module(module), module)  # again: its import may have begun before our watch
    except Exception as error:
        reason = f"{module} cannot be imported ({type(error).__name__}: {error})"
        return Absence(reason, _excused(error, need, module))
    return None


def _unknown_vllm(faults: Sequence[str]) -> SteeringError:
    return SteeringError("steering", f"trimtab does not know this vLLM: {'; '.join(faults)}")


def _excused(error: Exception, need: Need, module: str) -> bool:
    if not isinstance(error, ImportError) or not error.name:
        return need is Need.LIBRARIES
    if error.name.split(".")[0] != "vllm":
        return True  # a library that is not installed
    return need is Need.BY_VERSION and (module + ".").startswith(error.name + ".")


def put(owner: Any, name: str, replacement: Any) -> None:
    """Put `replacement` in the place of what is there, and mark it as ours."""
    setattr(getattr(replacement, "__func__", replacement), _MARK, True)
    setattr(owner, name, replacement)


def _has(owner: Any, name: str) -> bool:
    """Whether `owner` has an attribute, or is a class whose functions set it on its objects."""
    functions = [inspect.unwrap(value) for value in vars(owner or object).values() if inspect.isfunction(value)]
    return hasattr(owner, name) or any(name in function.__code__.co_names for function in functions)


def _mismatch(owner: Any, name: str, first: Sequence[str], *, exact: bool) -> str | None:
    where = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not hasattr(owner, name):
        return f"{where} is gone"
    if not first:
        return None
    found = list(inspect.signature(getattr(owner, name)).parameters)
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
