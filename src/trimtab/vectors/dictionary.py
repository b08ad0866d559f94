"""A dictionary: named rows of a sparse autoencoder, of which interventions of kind `feature` change one each.

    f = u where u > theta, else 0

    relu       u = x . w + bias                theta = 0
    jumprelu   u = x . w + bias                theta = the feature's threshold, or 0 if that is below
    gated      u = gain (x . w) + bias         f is 0 too where x . w + gate_bias is not above 0

So whether a feature fires follows from its own row. Of a TopK autoencoder it does not: which features are among the k
largest takes all of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import SteeringError
from trimtab.sites import Site
from trimtab.vectors.values import as_number, as_site
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown, summary, with_suggestions

ARCHITECTURES = ("relu", "jumprelu", "gated")
_TOPK = "which features fire then depends on all rows, and a dictionary holds named ones"
_REFUSED = {
    "topk": f"{_TOPK}: `add` a decoder row, or use a dictionary of another kind",
    "batchtopk": f"{_TOPK}: give it as jumprelu, with the threshold that was kept for inference",
}
_OWN = {"relu": (), "jumprelu": ("threshold",), "gated": ("gate_bias", "gain")}


@dataclass(frozen=True)
class DictionaryRow:
    """What there is of one feature: its rows of the encoder and the decoder, at one site, and its numbers."""

    encoder: SteeringVector
    decoder: SteeringVector
    bias: float = 0.0
    threshold: float | None = None  # of jumprelu
    gate_bias: float | None = None  # of gated
    gain: float | None = None  # of gated: exp(r_mag), the factor of what the magnitude sees of x . w


class Dictionary(Mapping[str, DictionaryRow]):
    """Rows by name, all at one site and of one width and architecture: "relu", "jumprelu" or "gated".

    Raises `SteeringError` for other architectures, with the reason, for rows that lack a number of theirs or have that
    of another, and for rows at different sites.
    """

    __slots__ = ("_architecture", "_rows")

    def __init__(self, architecture: str, rows: Mapping[str, DictionaryRow]) -> None:
        if not rows:
            raise SteeringError("rows", "is empty: a dictionary holds at least one row")
        for name, row in rows.items():
            place = f"rows[{shown(name)}]"
            if not isinstance(name, str) or not name:
                raise SteeringError(place, "want a name")
            for field in ("encoder", "decoder"):
                _check_vector(getattr(row, field), f"{place}.{field}", next(iter(rows.values())).encoder)
            numbers = {field: getattr(row, field) for field in ("threshold", "gate_bias", "gain")}
            for field, value in {"bias": row.bias, **numbers}.items():
                if value is not None:
                    as_number(value, f"{place}.{field}")
            try:
                check_architecture(architecture, **numbers)
            except SteeringError as error:
                at = error.field if error.field == "architecture" else f"{place}.{error.field}"
                raise SteeringError(at, error.message) from None
        self._architecture = architecture
        self._rows = dict(rows)

    @classmethod
    def from_weights(
        cls,
        architecture: str,
        site: Site,
        rows: Mapping[str, int],
        *,
        encoder: Any,
        decoder: Any,
        bias: Any,
        threshold: Any = None,
        gate_bias: Any = None,
        r_mag: Any = None,
        subtracted: Any = None,
    ) -> "Dictionary":
        """The rows of an autoencoder of F features for a stream of width H, `rows` naming the indices that are kept.

        `encoder` [H, F] and `decoder` [F, H] are arrays or tensors, as SAELens has W_enc and W_dec; `bias` [F] is
        b_enc, of gated ones b_mag; `threshold` [F], or one for all, is that of jumprelu; `gate_bias` [F] and `r_mag`
        [F] are those of gated. `subtracted` [H] is what the autoencoder takes off its input before it encodes (b_dec,
        where it does): it is made part of the biases. Raises `SteeringError` for shapes that do not fit, and as the
        constructor does.
        """
        by_column, by_row = _array(encoder, "encoder"), _array(decoder, "decoder")
        if by_column.ndim != 2 or by_row.shape != by_column.shape[::-1]:
            said = f"{list(by_row.shape)} beside an encoder of {list(by_column.shape)}: want [F, H] beside [H, F]"
            raise SteeringError("decoder", f"has the shape {said}")
        width, count = by_column.shape
        taken = np.zeros(width) if subtracted is None else _array(subtracted, "subtracted")
        if taken.shape != (width,):
            raise SteeringError("subtracted", f"has the shape {list(taken.shape)}, want [{width}]")
        given = {"bias": bias, "threshold": threshold, "gate_bias": gate_bias, "r_mag": r_mag}
        told = {
            name: _of_each(value, name, count) for name, value in given.items() if value is not None or name == "bias"
        }
        kept: dict[str, DictionaryRow] = {}
        for name, index in rows.items():
            if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < count:
                raise SteeringError(f"rows[{shown(name)}]", f"got {shown(index)}, want one of {count} features, from 0")
            vectors = [SteeringVector({as_site(site): row}) for row in (by_column[:, index], by_row[index])]
            own = {field: float(values[index]) for field, values in told.items()}
            gain = float(np.exp(own["r_mag"])) if "r_mag" in own else None
            less = float(by_column[:, index] @ taken)
            bias = own["bias"] - less * (1.0 if gain is None else gain)
            opens = own["gate_bias"] - less if "gate_bias" in own else None
            kept[name] = DictionaryRow(vectors[0], vectors[1], bias, own.get("threshold"), opens, gain)
        return cls(architecture, kept)

    @property
    def architecture(self) -> str:
        """How a feature's activation is made of its row."""
        return self._architecture

    @property
    def site(self) -> Site:
        """Where the rows read and write."""
        return next(iter(self._rows.values())).encoder.sites[0]

    def __getitem__(self, name: str) -> DictionaryRow:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def fields_of(self, name: Any) -> dict[str, Any]:
        """What an intervention of kind `feature` says of a row. Raises `SteeringError` for an unknown name."""
        if not isinstance(name, str) or name not in self._rows:
            hint = with_suggestions(name, self._rows)
            raise SteeringError("feature", f"there is no row {shown(name)}{hint}; there are {summary(sorted(self))}")
        found = {"architecture": self.architecture, **vars(self._rows[name])}
        return {field: value for field, value in found.items() if value is not None}


def check_architecture(architecture: str, threshold: float | None, gate_bias: float | None, gain: float | None) -> None:
    """Raise `SteeringError` for an architecture whose features do not follow from their own rows, and where one has not
    the numbers that are its own."""
    if architecture not in ARCHITECTURES:
        spelt = str(architecture).lower().replace("-", "").replace("_", "")
        why = f": {_REFUSED[spelt]}" if spelt in _REFUSED else with_suggestions(architecture, ARCHITECTURES)
        raise SteeringError("architecture", f"got {shown(architecture)}, want one of {', '.join(ARCHITECTURES)}{why}")
    for name, value in {"threshold": threshold, "gate_bias": gate_bias, "gain": gain}.items():
        if value is None and name in _OWN[architecture]:
            raise SteeringError(name, f"is required: the architecture is {architecture}")
        if value is not None and name not in _OWN[architecture]:
            owner = next(other for other in ARCHITECTURES if name in _OWN[other])
            raise SteeringError(name, f"belongs to {owner}, and the architecture is {architecture}: leave it out")
    if gain is not None and not gain > 0.0:
        raise SteeringError("gain", f"got {gain:g}, want a number above 0: the exponential of r_mag")


def _check_vector(vector: Any, place: str, first: SteeringVector) -> None:
    if not isinstance(vector, SteeringVector):
        raise SteeringError(place, f"got {type(vector).__name__}, want a SteeringVector")
    if len(vector.sites) != 1:
        raise SteeringError(place, f"a row is read and written at one site, this one has {len(vector.sites)}")
    if (vector.sites, vector.hidden_size) != (first.sites, first.hidden_size):
        said = f"is at {vector.sites[0]} with width {vector.hidden_size}, and the first row's encoder at "
        raise SteeringError(place, f"{said}{first.sites[0]} with width {first.hidden_size}")


def _array(value: Any, name: str) -> npt.NDArray[np.float64]:
    if hasattr(value, "detach"):  # a torch tensor: NumPy knows neither bfloat16 nor other devices
        value = value.detach().cpu().double().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise SteeringError(name, f"got an array of {array.dtype}, want numbers")
    return array.astype(np.float64)


def _of_each(value: Any, name: str, count: int) -> npt.NDArray[np.float64]:
    array = _array(value, name)
    if array.shape not in ((), (count,)):
        raise SteeringError(name, f"has the shape {list(array.shape)}, want [{count}]")
    return np.broadcast_to(array, (count,))
