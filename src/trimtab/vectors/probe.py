"""A probe: a direction read from the residual stream at one site, the evidence on which a gate decides."""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.errors import SteeringError
from trimtab.sites import Site
from trimtab.vectors.content import Content, VectorMetadata
from trimtab.vectors.files import read_file, read_probe, reading, write_probe
from trimtab.vectors.values import FloatArray, as_number
from trimtab.vectors.vector import SteeringVector


@dataclass(frozen=True)
class Probe:
    """The score of a token is `x . direction + bias`, x [hidden_size] being the residual stream at the probe's site.

    `vector` holds the direction: a `SteeringVector` at exactly one site. Raises `SteeringError` for more sites, and for
    a bias that is not finite in float32.
    """

    vector: SteeringVector
    bias: float = 0.0

    def __post_init__(self) -> None:
        if len(self.vector.sites) != 1:
            raise SteeringError("vector", f"a probe is read at one site, this vector has {len(self.vector.sites)}")
        object.__setattr__(self, "bias", as_number(self.bias, "bias"))

    @classmethod
    def at(cls, site: Site, direction: Any, bias: float = 0.0, metadata: VectorMetadata | None = None) -> "Probe":
        """A probe of a list, array or tensor [hidden_size] at `site`."""
        return cls(SteeringVector({site: direction}, metadata), bias)

    @property
    def site(self) -> Site:
        """Where the stream is read."""
        return self.vector.sites[0]

    @property
    def direction(self) -> FloatArray:
        """float32 [hidden_size], read-only."""
        return self.vector.directions[self.site]

    @property
    def metadata(self) -> VectorMetadata:
        """Where the probe comes from."""
        return self.vector.metadata

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of site, direction and bias."""
        return hashlib.sha256(b"trimtab probe 1\0" + self.vector.digest + struct.pack("<f", self.bias)).digest()

    def save(self, path: str | Path) -> None:
        """Write to a `.safetensors` file. Raises `SteeringError` for another suffix or an unwritable path."""
        write_probe(self.vector, self.bias, Path(path))

    @staticmethod
    def load(path: str | Path) -> "Probe":
        """Read a file that `save` wrote. Raises `SteeringError` for any other."""
        with reading(Path(path), "a probe"):
            return _probe(read_probe(Path(path)))


def load_vector_or_probe(path: Path, hook: str | None = None) -> SteeringVector | Probe:
    """What a file holds, vector or probe, in any known format. Raises `SteeringError` as `load` of both does."""
    with reading(path, "a steering vector or a probe"):
        content = read_file(path, hook=hook, probes_too=True)
        return SteeringVector(content.directions, content.metadata) if content.bias is None else _probe(content)


def _probe(content: Content) -> Probe:
    assert content.bias is not None, "a probe's file has a bias"
    return Probe(SteeringVector(content.directions, content.metadata), content.bias)
