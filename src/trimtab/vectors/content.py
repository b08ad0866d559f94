"""What a vector file holds and says of itself, before any number of it is checked: what formats read and write."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trimtab.sites import Site
from trimtab.vectors.values import FloatArray


@dataclass(frozen=True)
class VectorMetadata:
    """Where a vector comes from. Informative only: it never enters a digest."""

    base_model: str = ""
    method: str = ""
    source: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


def model_name(config: Any) -> str:
    """What to call the model of a Transformers `config` in metadata: its hub name, or its folder's own name.

    A file is passed on, and where a folder lies says more of the machine than of the model.
    """
    return short_name(str(getattr(config, "_name_or_path", "") or ""))


def short_name(name: str) -> str:
    """A model's hub name as it is, and its folder's own name of a path."""
    path = Path(name)
    local = path.is_absolute() or name.startswith((".", "~")) or path.is_dir()
    return path.expanduser().resolve().name if name and local else name


@dataclass(frozen=True)
class Content:
    """Directions by site, in whatever form a format has them; `bias` is a probe's, None for a vector."""

    directions: Mapping[Site, Any]
    metadata: VectorMetadata
    bias: float | None = None


class Writable(Protocol):
    """What formats write: a `SteeringVector`."""

    @property
    def sites(self) -> tuple[Site, ...]: ...

    @property
    def directions(self) -> Mapping[Site, FloatArray]: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def metadata(self) -> VectorMetadata: ...
