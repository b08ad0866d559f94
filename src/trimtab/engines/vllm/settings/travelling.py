"""How a steered engine's configuration tells another process to patch its vLLM."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar


class Travelling(dict[str, Any]):
    """The `additional_config` of a steered engine. Whoever unpickles it has the patches of his process installed.

    A front end may get its configuration from another process, which made it, and then calls nothing that loads
    plugins: Ray Serve LLM's replicas do. It is a plain dict for all else, hashes and JSON included, and what its
    process has read of it stays there.
    """

    settings: Any = None  # the `SteeringSettings` of this process, with the content of their files

    # Makes it again where it arrives; the plugin sets it to a function of its own, which installs the patches.
    arrive: ClassVar[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = dict

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).arrive, (dict(self),)
