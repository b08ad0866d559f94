"""Per-request, per-token activation steering inside stock vLLM and Transformers.

    from trimtab import Dictionary, Probe, SteeredModel, Steering, SteeringVector

The names are imported when they are first used: a server process that only validates requests never loads a model
library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimtab.version import __version__

if TYPE_CHECKING:
    from trimtab.engines.transformers import SteeredModel
    from trimtab.errors import SteeringError
    from trimtab.spec import Steering
    from trimtab.vectors import Dictionary, Probe, SteeringVector

__all__ = ["Dictionary", "Probe", "SteeredModel", "Steering", "SteeringError", "SteeringVector", "__version__"]

_HOMES = {
    "Dictionary": "trimtab.vectors",
    "Probe": "trimtab.vectors",
    "SteeredModel": "trimtab.engines.transformers",
    "Steering": "trimtab.spec",
    "SteeringError": "trimtab.errors",
    "SteeringVector": "trimtab.vectors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
