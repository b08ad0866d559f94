"""The gate of an intervention as a request writes it."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import ResolvedGate, VectorReference
from trimtab.spec.base import Model
from trimtab.spec.fields import Number, ProbeSource
from trimtab.vectors.probe import Probe
from trimtab.wording import summary, with_suggestions


class Gate(Model):
    """The factor of one intervention per token: `sigmoid(sharpness * (score - threshold))`.

    The score is `x . direction + bias` of `probe`, x being the residual stream before any steering at the probe's site;
    `probe` is a registered name, a `Probe`, or an inline direction at one site, beside which a `"bias"` may stand.
    `hard` makes the factor 1 where the score is above the threshold and 0 elsewhere, `invert` turns it into one minus
    itself.
    """

    probe: ProbeSource
    threshold: Number
    sharpness: Number = 1.0
    invert: Annotated[bool, Field(strict=True)] = False
    hard: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _sharpness_means_something(self) -> Self:
        if self.sharpness <= 0:
            raise SteeringError("sharpness", f"got {self.sharpness}, want a number above 0; `invert` reverses a gate")
        if self.hard and "sharpness" in self.model_fields_set:
            raise SteeringError("sharpness", "has no effect on a hard gate: leave it out")
        return self

    @model_serializer(mode="wrap")
    def _dumped(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What reads back to it: a hard gate takes no sharpness."""
        dumped: dict[str, Any] = plain(self)
        if self.hard:
            dumped.pop("sharpness", None)
        return dumped

    @property
    def members(self) -> dict[str, "Gate"]:
        """The gates that it is made of: itself. See `trimtab.spec.joint_gate`."""
        return {"": self}

    def resolve(self, probes: Mapping[str, Probe]) -> ResolvedGate:
        """The gate with its probe looked up in `probes`. Raises `SteeringError` below the gate."""
        reference: VectorReference | None = None
        label = ""
        if isinstance(self.probe, Probe):
            probe = self.probe
        elif (found := probes.get(self.probe)) is None:
            known = f"registered are {summary(sorted(probes))}" if probes else "no probe is registered"
            hint = with_suggestions(self.probe, probes)
            raise SteeringError("probe", f"there is no probe {self.probe!r}{hint}; {known}")
        else:
            probe, reference, label = found, VectorReference(self.probe, found.vector.digest), self.probe
        sharpness = None if self.hard else self.sharpness
        return ResolvedGate.of(probe.vector, self.threshold - probe.bias, sharpness, self.invert, reference, label)
