"""The setting of the engine's monitor, which never changes while an engine runs: see `trimtab.program.monitor`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate, VectorReference
from trimtab.sites import GateLimits, Site, site_order
from trimtab.spec.fields import Number
from trimtab.vectors.probe import Probe

FIELD = f"{SETTINGS_KEY}.monitor"


class MonitorSettings(BaseModel):
    """What `steering.monitor` may say; the keys mean what they mean in a gate, but for `probe`, which is a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probe: str
    threshold: Number
    sharpness: Number = 1.0
    invert: bool = False

    def load(self) -> ResolvedGate:
        """The monitor, its probe read from the file. Raises `SteeringError` at the key that is at fault."""
        try:
            probe = Probe.load(self.probe)
        except (OSError, ValueError) as error:
            raise SteeringError(f"{FIELD}.probe", f"{self.probe} cannot be loaded: {error}") from error
        reference = VectorReference(MONITOR_LABEL, probe.vector.digest)  # each process reads the file
        threshold = self.threshold - probe.bias
        try:
            return ResolvedGate.of(probe.vector, threshold, self.sharpness, self.invert, reference, MONITOR_LABEL)
        except SteeringError as error:
            raise SteeringError(f"{FIELD}.{error.field}", error.message) from None

    def describe(self, gate: ResolvedGate) -> dict[str, Any]:
        """The monitor as the status route shows it."""
        return {
            "probe": Path(self.probe).name,
            "site": str(gate.site),
            "threshold": self.threshold,
            "sharpness": self.sharpness,
            "invert": self.invert,
            "digest": gate.digest.hex(),
        }


def check_reach(monitor: ResolvedGate, sites: Iterable[Site], stages: tuple[int, ...]) -> None:
    """Raise `SteeringError` where one of the steered `sites` is beyond the monitor's pipeline stage.

    Its factors do not travel from stage to stage, so steering there would not be behind it. `stages` are the first
    layers of the later stages.
    """
    limits = GateLimits(stages=stages)
    own = limits.stage(monitor.site.layer)
    beyond = sorted((site for site in sites if limits.stage(site.layer) > own), key=site_order)
    if beyond:
        boundary = stages[own]
        raise SteeringError(
            f"{FIELD}.probe",
            f"is read at {monitor.site}, and {beyond[0]} is steered, beyond the pipeline stage that ends before layer "
            f"{boundary}: a monitor works within one stage; steer layers below {boundary} only (`layers`), or use a "
            f"probe in the last stage, at layer {stages[-1]} or later",
        )
