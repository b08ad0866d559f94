"""What is known of a trained probe: how it was chosen, how well it does on texts of its own, what can be promised."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from trimtab.sites import Site
from trimtab.training.statistics import Interval
from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.probe import Probe

Unit = Literal["token", "text"]


@dataclass(frozen=True)
class LayerResult:
    """How well a layer's probe separates tokens of training texts held out in turn: what the layer is chosen by.

    The best of many such numbers flatters itself. The chosen probe's own is `ProbeReport.auroc`.
    """

    site: Site
    auroc: float


@dataclass(frozen=True)
class Operating:
    """A threshold for a promised false-positive rate, and what it gives on the report's texts.

    With `confidence`, at most a share `false_positive_rate` of fresh negative texts has a token above the threshold
    (`unit` "text"), or of the tokens of a fresh negative text, on average over texts (`unit` "token").
    """

    unit: Unit
    false_positive_rate: float
    threshold: float
    confidence: float
    false_positives_per_token: Interval
    false_positives_per_text: Interval
    true_positives_per_token: Interval
    true_positives_per_text: Interval


@dataclass(frozen=True)
class Unpromised:
    """A false-positive rate that was asked for and that so few negative texts cannot support."""

    unit: Unit
    false_positive_rate: float
    lowest: float  # the rate that they do support
    texts: int  # negative texts that set thresholds
    texts_needed: int  # as many would be needed


@dataclass(frozen=True)
class ProbeReport:
    """The probe of the best layer, and what texts that had no part in making it say of it."""

    probe: Probe
    auroc: Interval  # a token of a positive text above one of a negative text
    auroc_of_texts: Interval  # the same of the texts' highest tokens
    p_value: float  # of the permutation test on `auroc`
    significance: float
    confidence: float  # of every interval and promise
    layers: tuple[LayerResult, ...]
    thresholds: tuple[Operating, ...]
    unpromised: tuple[Unpromised, ...]
    trained_on: tuple[int, int]  # different positive and negative texts, here and below
    thresholds_from: tuple[int, int]
    reported_on: tuple[int, int]
    repeated: int  # texts that repeat another, or share its group, and so count with it

    @property
    def better_than_chance(self) -> bool:
        """Whether chance alone would do as well in at most a share `significance` of all cases."""
        return self.p_value <= self.significance

    def with_metadata(self, metadata: VectorMetadata) -> "ProbeReport":
        """The same, with this metadata on the probe."""
        return replace(self, probe=Probe(self.probe.vector.with_metadata(metadata), self.probe.bias))

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a script."""
        return {
            "digest": self.probe.digest.hex(),
            "site": str(self.probe.site),
            "bias": self.probe.bias,
            "better_than_chance": self.better_than_chance,
            "p_value": self.p_value,
            "significance": self.significance,
            "confidence": self.confidence,
            "auroc": vars(self.auroc),
            "auroc_of_texts": vars(self.auroc_of_texts),
            "layers": [{"site": str(one.site), "auroc": one.auroc} for one in self.layers],
            "thresholds": [
                {key: vars(value) if isinstance(value, Interval) else value for key, value in vars(one).items()}
                for one in self.thresholds
            ],
            "unpromised": [vars(one) for one in self.unpromised],
            "texts": {
                name: {"positive": counts[0], "negative": counts[1]}
                for name, counts in (
                    ("trained_on", self.trained_on),
                    ("thresholds_from", self.thresholds_from),
                    ("reported_on", self.reported_on),
                )
            },
            "repeated": self.repeated,
        }
