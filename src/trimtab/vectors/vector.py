"""A steering vector: one float32 direction per site, immutable, known by the digest of its content.

Only NumPy is needed here, so that a client or a front end need not load torch for it.
"""

import hashlib
import math
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site, in_order, site_order
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.files import read_file, reading, write_vector
from trimtab.vectors.values import FloatArray, as_direction, as_site, largest, owners
from trimtab.wording import summary

# Selections of sites that one vector remembers, so that requests which narrow it cost nothing: how many at most, and
# how many times its own size they may take together. Callers choose layers, so both are bounded.
_NARROWED_KEPT, _NARROWED_SIZES = 64, 2
_NARROWING = threading.Lock()  # one for all vectors, which are pickled and shared between threads


class Part(NamedTuple):
    """The part of a vector before a site, in the order of the forward pass, or the one from that site on."""

    site: Site
    before: bool


Key = tuple[int, ...] | tuple[HookPoint, ...] | Part  # of a selection of sites


class SteeringVector:
    """Directions of one width at one or more sites.

    `directions` maps a `Site` (or a plain `(layer, hook)` pair) to H numbers: a list, a NumPy array or a torch tensor.
    They are rounded to float32 once, here. Raises `SteeringError` for no sites, a bad site, a shape other than [H],
    two widths, and anything that is not a finite number.
    """

    __slots__ = ("_block", "_digest", "_directions", "_max_abs", "_metadata", "_narrowed", "_site_digests", "_sites")

    def __init__(self, directions: Mapping[Site, Any], metadata: VectorMetadata | None = None) -> None:
        if not directions:
            raise SteeringError(
                "directions", "a steering vector needs at least one site, such as Site(14, 'post_block')"
            )
        rows: dict[Site, FloatArray] = {}
        for key, value in directions.items():
            site = as_site(key)
            name = f"directions[{site}]"
            rows[site] = as_direction(value, name)
            width = len(next(iter(rows.values())))
            if len(rows[site]) != width:
                raise SteeringError(name, f"has {len(rows[site])} numbers, but {next(iter(rows))} has {width}")
        if len(rows) != len(directions):
            raise SteeringError("directions", "two keys name the same site")
        self._fill(tuple(rows), np.stack(list(rows.values())), metadata)

    @classmethod
    def from_block(
        cls,
        sites: Sequence[Site],
        block: npt.NDArray[Any],
        metadata: VectorMetadata | None = None,
        *,
        field: str = "",
        max_abs: float | None = None,
    ) -> Self:
        """Build from distinct `sites` and their directions, the rows of `block` [len(sites), H] (float16, 32 or 64).

        The array is taken over where it is float32 already: do not write to it afterwards. Raises `SteeringError` at
        `field` where a number is not finite in float32; `max_abs` is for a caller that has looked already.
        """
        if block.ndim != 2 or len(sites) != len(block) or block.shape[1] == 0 or not sites:
            raise SteeringError(field, f"got an array of shape {list(block.shape)} for {len(sites)} sites; want [n, H]")
        if len(set(sites)) != len(sites):
            raise SteeringError(field, "one site is given twice")
        if block.dtype != np.float32:
            with np.errstate(over="ignore"):  # what overflows is refused just below
                block = block.astype(np.float32)
        if not math.isfinite(peak := largest(block) if max_abs is None else max_abs):
            row, column = np.argwhere(~np.isfinite(block))[0]
            raise SteeringError(field, f"number {column} at {sites[row]} is not finite in float32")
        vector = cls.__new__(cls)
        vector._fill(tuple(sites), block, metadata)
        vector._max_abs = peak
        return vector

    def _fill(self, sites: tuple[Site, ...], block: FloatArray, metadata: VectorMetadata | None) -> None:
        order = sorted(range(len(sites)), key=lambda i: site_order(sites[i]))
        if order != list(range(len(sites))):
            sites, block = tuple(sites[i] for i in order), block[order]
        spread = len(block) > 1 and block.strides[0] == 0 and block[0].flags.c_contiguous
        block = (block if spread else np.ascontiguousarray(block)).view()
        block.flags.writeable = False
        self._sites = sites
        self._block = block
        self._metadata = metadata or VectorMetadata()
        self._digest: bytes | None = None
        self._directions: Mapping[Site, FloatArray] | None = None
        self._max_abs: float | None = None
        self._narrowed: dict[Key, SteeringVector] = {}
        self._site_digests: list[bytes] | None = None

    # --- what it holds

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of the forward pass."""
        return self._sites

    @property
    def block(self) -> FloatArray:
        """All directions as one read-only array [len(sites), H] in the order of `sites`."""
        return self._block

    @property
    def whole(self) -> npt.NDArray[Any]:
        """The array that `block` is a view of: larger where the vector is a part of another."""
        return owners(self._block)[-1]

    @property
    def directions(self) -> Mapping[Site, FloatArray]:
        """Read-only mapping of each site to its read-only direction [H]."""
        if self._directions is None:
            self._directions = MappingProxyType(dict(zip(self._sites, self._block, strict=True)))
        return self._directions

    @property
    def metadata(self) -> VectorMetadata:
        """Where the vector comes from."""
        return self._metadata

    @property
    def hidden_size(self) -> int:
        """H, the width of every direction."""
        return int(self._block.shape[1])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a site, ascending."""
        return tuple(sorted({site.layer for site in self._sites}))

    @property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of sites and float32 content; equal for equal content, whatever it was packed in."""
        if self._digest is None:
            whole = hashlib.sha256(b"trimtab vector 1\0")
            for site, digest in zip(self._sites, self._digests_of_sites(), strict=True):
                whole.update(f"{site.layer} {site.hook.value} {self.hidden_size}\0".encode() + digest)
            self._digest = whole.digest()
        return self._digest

    def digest_at(self, site: Site) -> bytes:
        """SHA-256 (32 bytes) of its float32 direction at one of its sites, whichever that is."""
        return self._digests_of_sites()[bisect_left(self._sites, site_order(site), key=site_order)]

    def _digests_of_sites(self) -> list[bytes]:
        # One digest per site, so that a narrowed vector is named without reading its numbers again.
        if self._site_digests is None:
            little_endian = self._block.astype("<f4", copy=False)
            self._site_digests = [hashlib.sha256(row).digest() for row in little_endian]
        return self._site_digests

    @property
    def max_abs(self) -> float:
        """The largest absolute value in any direction; 0 means that the vector does nothing."""
        if self._max_abs is None:
            self._max_abs = largest(self._block)
        return self._max_abs

    def norms(self) -> dict[Site, float]:
        """The Euclidean length of each direction."""
        lengths = np.linalg.norm(self._block.astype(np.float64), axis=1)
        return dict(zip(self._sites, lengths.tolist(), strict=True))

    # --- arithmetic: every result is a new vector

    def __mul__(self, factor: float) -> "SteeringVector":
        if isinstance(factor, bool) or not isinstance(factor, (int, float, np.floating, np.integer)):
            return NotImplemented
        return self._with_block(self._block.astype(np.float64) * float(factor), self._metadata)

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """Sum at each site; a site that only one of them has is taken as it is."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if other.hidden_size != self.hidden_size:
            raise SteeringError("", f"cannot add vectors of width {self.hidden_size} and {other.hidden_size}")
        total = {site: row.astype(np.float64) for site, row in self.directions.items()}
        for site, row in other.directions.items():
            total[site] = total[site] + row if site in total else row.astype(np.float64)
        same_model = self._metadata.base_model == other._metadata.base_model
        metadata = VectorMetadata(base_model=self._metadata.base_model if same_model else "", method="sum")
        return SteeringVector.from_block(list(total), np.stack(list(total.values())), metadata)

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def normalized(self) -> "SteeringVector":
        """Each direction scaled to Euclidean length 1. Raises `SteeringError` where a direction is zero."""
        norms = self.norms()
        zero = [str(site) for site, norm in norms.items() if norm == 0]
        if zero:
            raise SteeringError("", f"the direction at {zero[0]} is zero and cannot be normalized")
        return self._with_block(self._block / np.array(list(norms.values()))[:, None], self._metadata)

    def at(self, layers: Iterable[int]) -> "SteeringVector":
        """The same directions at these layers alone. Raises `SteeringError` for a layer without a site."""
        wanted = tuple(sorted(set(layers)))
        if (known := self._narrowed.get(wanted)) is not None:
            return known
        mine = self.layers
        missing = sorted(set(wanted).difference(mine))
        if missing or not wanted:
            given = f"layer {missing[0]} is not among its layers" if missing else "no layer is given; its layers are"
            raise SteeringError("layers", f"{given} {summary(mine)}")
        return self._narrow(wanted, [i for i, site in enumerate(self._sites) if site.layer in wanted])

    def at_hooks(self, hooks: Iterable[HookPoint]) -> "SteeringVector":
        """The same directions at these hook points alone. Raises `SteeringError` for one without a site."""
        wanted = in_order(hooks)
        if (known := self._narrowed.get(wanted)) is not None:
            return known
        mine = in_order(site.hook for site in self._sites)
        missing = [hook.value for hook in wanted if hook not in mine]
        if missing or not wanted:
            given = f"{missing[0]} is not among its hook points" if missing else "no hook point is given; its own are"
            raise SteeringError("hooks", f"{given} {summary(mine)}")
        return self._narrow(wanted, [i for i, site in enumerate(self._sites) if site.hook in wanted])

    def acting(self, layers: Iterable[int] | None, hooks: Iterable[HookPoint] | None) -> "SteeringVector":
        """The vector where an intervention lets it act: one with one site is spread over `layers` and `hooks`, of
        others their own at these are kept. Raises `SteeringError` as `at` and `at_hooks` do."""
        if len(self._sites) == 1 and (layers, hooks) != (None, None):
            own = self._sites[0]
            places = (own.hook,) if hooks is None else tuple(hooks)
            return self.spread(Site(layer, hook) for layer in layers or (own.layer,) for hook in places)
        narrowed = self if layers is None else self.at(layers)
        return narrowed if hooks is None else narrowed.at_hooks(hooks)

    def spread(self, sites: Iterable[Site]) -> "SteeringVector":
        """The one direction of a vector with one site, at each of `sites`. It is held once."""
        if len(self._sites) != 1:
            raise ValueError(f"a vector with {len(self._sites)} sites cannot be spread")
        ordered = tuple(sorted(set(sites), key=site_order))
        if ordered == self._sites:
            return self
        block = np.broadcast_to(self._block, (len(ordered), self.hidden_size))
        spread = SteeringVector.from_block(ordered, block, self._metadata, max_abs=self.max_abs)
        spread._site_digests = self._digests_of_sites() * len(ordered)
        return spread

    @property
    def is_spread(self) -> bool:
        """Whether it has the direction of its first site at every site, held once."""
        return len(self._sites) > 1 and self._block.strides[0] == 0

    def part(self, part: Part) -> "SteeringVector | None":
        """The same directions at the sites of `part` alone; None where the vector has none there."""
        if (known := self._narrowed.get(part)) is not None:
            return known
        cut = bisect_left(self._sites, site_order(part.site), key=site_order)
        kept = range(cut) if part.before else range(cut, len(self._sites))
        return self._narrow(part, kept) if kept else None

    def _narrow(self, key: Key, kept: list[int] | range) -> "SteeringVector":
        if len(kept) == len(self._sites):
            return self
        digests, sites = self._digests_of_sites(), tuple(self._sites[i] for i in kept)
        if self.is_spread:
            kept = range(len(kept))  # all rows are one
        rows = slice(kept.start, kept.stop) if isinstance(kept, range) else kept  # of a range, nothing is copied
        narrow = self._with_block(self._block[rows], self._metadata, sites)
        narrow._site_digests = [digests[i] for i in kept]
        with _NARROWING:
            self._narrowed[key] = narrow
            held = sum(len(kept.sites) for kept in self._narrowed.values())
            while len(self._narrowed) > _NARROWED_KEPT or held > _NARROWED_SIZES * len(self._sites):
                held -= len(self._narrowed.pop(next(iter(self._narrowed))).sites)
        return narrow

    def with_metadata(self, metadata: VectorMetadata) -> "SteeringVector":
        """The same content under other metadata."""
        return self._with_block(self._block, metadata)

    def _with_block(
        self, block: npt.NDArray[Any], metadata: VectorMetadata, sites: tuple[Site, ...] | None = None
    ) -> "SteeringVector":
        return SteeringVector.from_block(sites or self._sites, block, metadata)

    # --- files

    def save(self, path: str | Path) -> None:
        """Write to `.safetensors` (the native format) or `.gguf`, by the suffix. Raises `SteeringError` otherwise."""
        write_vector(self, Path(path))

    @staticmethod
    def load(path: str | Path, *, hook: str | None = None) -> "SteeringVector":
        """Read any format of docs/formats.md. `hook` is the hook point at which layers of a `.svec` file act.

        Raises `SteeringError` for a file that cannot be read as one, and for a `hook` beside another format.
        """
        with reading(Path(path), "a steering vector"):
            content = read_file(Path(path), hook=hook)
            return SteeringVector(content.directions, content.metadata)

    # --- values: equal by content, shared rather than copied because nothing in them can change

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, SteeringVector) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __copy__(self) -> "SteeringVector":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SteeringVector":
        return self

    def __repr__(self) -> str:
        return f"SteeringVector({summary([str(site) for site in self._sites])}, hidden_size={self.hidden_size})"
