"""The norms of a model's stream that an engine is given at its start, for doses of vectors that do not say them.

They are read from a vector file, as `trimtab extract` writes it: its metadata hold the median norm of the stream at
each site that was read (`trimtab.vectors.dose`). The vector in that file plays no part.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import SteeringError
from trimtab.sites import ModelSites, Site, site_order
from trimtab.vectors.dose import STREAM_NORM
from trimtab.vectors.formats.native import site_of_key
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import summary

_COMMIT = re.compile(r"[0-9a-f]{40}")  # the folder of a snapshot, which does not say of what


@dataclass(frozen=True)
class StreamNorms:
    """The median norm of the stream at each site of a model of this width; `base_model` is "" where not known."""

    by_site: Mapping[Site, float]
    hidden_size: int
    base_model: str = ""

    @classmethod
    def load(cls, path: str | Path) -> "StreamNorms":
        """The norms in the metadata of a vector file. Raises `SteeringError` where it is unreadable, or as `said_by`
        does."""
        return cls.said_by(SteeringVector.load(path))

    @classmethod
    def said_by(cls, vector: SteeringVector) -> "StreamNorms":
        """The norms in the metadata of a vector.

        Raises `SteeringError` where there is none, and for one that is no positive finite number, or has no site.
        """
        said = vector.metadata.extra.items()
        norms = {_site(key): _norm(key, value) for key, value in said if key.startswith(STREAM_NORM)}
        if not norms:
            told = f"has no norms: want a vector whose metadata hold {STREAM_NORM}HOOK.LAYER, as `trimtab extract` "
            raise SteeringError("", told + "writes it")
        return cls(norms, vector.hidden_size, vector.metadata.base_model)

    @property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of sites and norms."""
        plain = [[str(site), self.by_site[site]] for site in sorted(self.by_site, key=site_order)]
        return hashlib.sha256(b"trimtab norms 1\0" + json.dumps(plain).encode()).digest()

    def check(self, model: ModelSites, field: str) -> None:
        """Raise `SteeringError` at `field` where these are not norms of `model`, or none is of a site it serves."""
        if self.hidden_size != model.hidden_size:
            said = f"are of a model of width {self.hidden_size}, this model has hidden size {model.hidden_size}"
            raise SteeringError(field, said)
        sites = sorted(self.by_site, key=site_order)
        if sites[-1].layer >= model.num_layers:
            said = f"has a norm at {sites[-1]}; the model has layers 0 to {model.num_layers - 1}"
            raise SteeringError(field, said)
        if model.sites.isdisjoint(sites):
            served = sorted(model.sites, key=site_order)
            here, there = (summary([str(site) for site in some]) for some in (sites, served))
            raise SteeringError(field, f"has norms at {here}, and none where this engine steers: {there}")


def doubt_of_model(base_model: str, served: str) -> str | None:
    """What to tell an operator where content says that it is of another model than the one `served`, or None.

    A doubt and no fault: models are known by names, and a copy or a relative has another.
    """
    mine, theirs = (name.rstrip("/").rpartition("/")[2] for name in (base_model, served))
    if not mine or not theirs or mine.casefold() == theirs.casefold() or any(map(_COMMIT.fullmatch, (mine, theirs))):
        return None
    return f"measured in {base_model}, where {served} is served: doses may be counted in another stream's norms"


def _site(key: str) -> Site:
    try:
        return site_of_key(key.removeprefix(STREAM_NORM))
    except SteeringError as error:
        raise SteeringError(f"metadata {key!r:.80}", error.message) from None


def _norm(key: str, value: str) -> float:
    try:
        norm = float(value)
    except ValueError:
        norm = math.nan
    if not (math.isfinite(norm) and norm > 0.0):
        raise SteeringError(f"metadata {key!r:.80}", f"is {value!r:.80}, want a norm: finite, and above 0")
    return norm
