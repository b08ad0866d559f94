"""A gate with its probe resolved: what decides, per token, how much of an intervention is applied.

    score = x . probe,   y = sigmoid(sharpness * (score - threshold)),   or (score > threshold) where the gate is hard
    factor = 1 - y where inverted, else y

A gate with a schedule is a clock: its probe is zero, and its factor that of the token's place in the answer.

x is the residual stream at the probe's site before any steering there, so the factor is a function of the token and
what precedes it, and of the request alone. A probe's bias is part of the threshold.
"""

import hashlib
import math
import struct
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from trimtab.errors import SteeringError
from trimtab.program.schedules import Schedule
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors.vector import Part, SteeringVector

MONITOR_LABEL = "(monitor)"
"""Under which reports tell of an engine's own gate. No name that can be registered has parentheses."""

CLOCK_LABEL = "(schedule)"

MAX_PROBE_VALUE = 65504.0  # scores of any stream that fits a model dtype then stay finite in float32
MIN_PROBE_VALUE = 2.0**-64  # 5.4e-20: products with such a stream then keep their digits in float32
MIN_SHARPNESS = 2.0**-126  # the smallest normal float32; 0 would mean a hard gate


@dataclass(frozen=True)
class VectorReference:
    """How a vector can be named instead of sent: a registered vector, acting at `layers` and `hooks` (as of
    `SteeringVector.acting`), and of that `part`, where they are given."""

    name: str
    digest: bytes
    layers: tuple[int, ...] | None = None
    part: Part | None = None
    hooks: tuple[HookPoint, ...] | None = None


@dataclass(frozen=True)
class ResolvedGate:
    """`probe` is a direction at exactly one site; `threshold` and `sharpness` are float32, sharpness 0 means hard.

    Build it with `ResolvedGate.of`. `reference` says how a process that holds the same probes can be told of it,
    `label` under which name it was asked for ("" = none), for reports: neither is part of what it does.
    """

    probe: SteeringVector
    threshold: float
    sharpness: float
    invert: bool = False
    reference: VectorReference | None = field(default=None, compare=False)
    label: str = field(default="", compare=False)
    path: str = field(default="", compare=False)  # where it stands in a gate of several, for messages
    schedule: Schedule | None = None

    @classmethod
    def of(
        cls,
        probe: SteeringVector,
        threshold: float,
        sharpness: float | None,
        invert: bool = False,
        reference: VectorReference | None = None,
        label: str = "",
    ) -> "ResolvedGate":
        """The gate in its canonical numbers; `sharpness=None` makes it hard.

        Raises `SteeringError` at `probe`, `threshold` or `sharpness` where float32 cannot hold what is needed.
        """
        if len(probe.sites) != 1:
            raise SteeringError("probe", f"a probe is read at one site, this one has {len(probe.sites)}")
        if probe.max_abs > MAX_PROBE_VALUE:
            raise SteeringError("probe", f"values reach {probe.max_abs:g}, more than {MAX_PROBE_VALUE:g}")
        with np.errstate(over="ignore"):
            rounded = float(np.float32(threshold)) + 0.0  # of -0.0, 0.0
            slope = 0.0 if sharpness is None else float(np.float32(sharpness))
        if 0.0 < probe.max_abs < MIN_PROBE_VALUE:
            remedy = "multiply probe and threshold by one factor, and divide the sharpness by it"
            raise SteeringError(
                "probe",
                f"values reach {probe.max_abs:g}, less than {MIN_PROBE_VALUE:.2g}: scores would lose digits; {remedy}",
            )
        if not math.isfinite(rounded):
            raise SteeringError("threshold", f"is {threshold} with the probe's bias, not finite in float32")
        if sharpness is not None and not (slope >= MIN_SHARPNESS and math.isfinite(slope)):
            wanted = f"a number from {MIN_SHARPNESS:.2g} on that is finite in float32"
            raise SteeringError("sharpness", f"got {sharpness}, want {wanted}")
        return cls(probe, rounded, slope, bool(invert), reference, label)

    @classmethod
    def clock(cls, schedule: Schedule, site: Site, width: int) -> "ResolvedGate":
        """A gate whose factor is the schedule's, from `site` on, for vectors of `width`."""
        nothing = SteeringVector({site: np.zeros(width, np.float32)})
        return cls(nothing, 0.0, 1.0, label=CLOCK_LABEL, schedule=schedule)

    @property
    def site(self) -> Site:
        """Where the probe is read."""
        return self.probe.sites[0]

    @property
    def name(self) -> str:
        """What to call the probe: its registered name, or the first digits of its direction's digest."""
        return self.label or self.probe.digest.hex()[:12]

    @property
    def members(self) -> tuple["ResolvedGate", ...]:
        """The gates that it is made of: itself. See `trimtab.program.joint_gate`."""
        return (self,)

    @property
    def told(self) -> tuple[int, int, int]:
        """How much reports and other processes can say of it; among equal gates the one with most is kept."""
        return self.label == MONITOR_LABEL, self.reference is not None, bool(self.label)

    @property
    def hard(self) -> bool:
        """Whether the factor is 0 or 1, changing at the threshold."""
        return self.sharpness == 0.0

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of all that decides: the probe's site and numbers, threshold, sharpness and options."""
        numbers = struct.pack("<ff?", self.threshold, self.sharpness, self.invert)
        told = b"" if self.schedule is None else b"clock\0" + self.schedule.packed
        return hashlib.sha256(b"trimtab gate 1\0" + self.probe.digest + numbers + told).digest()


def check_monitor(gate: ResolvedGate) -> None:
    """Raise `SteeringError` at `hard` where a gate cannot be a monitor.

    A monitor belongs to an engine or to a table row instead of an intervention, and acts on decode tokens alone.
    """
    if gate.hard:
        raise SteeringError("hard", "a monitor opens gradually: leave `hard` out, and give a large `sharpness`")


def rows_needed(max_requests: int, gates: int, slots: int = 0, slot_rows: int = 2) -> int:
    """Rows of each table for any `max_requests` requests whose phases have at most so many gates and slots each.

    They are a row per phase, one per gate and phase, `slot_rows` for a slot and phase (one for each of its directions,
    or more where they are read to more digits than a row has), and row 0.
    """
    return 1 + len(Phase) * max_requests * (1 + gates + slot_rows * slots)


def probes_needed(max_requests: int, gates: int) -> int:
    """Rows of the probe table for any `max_requests` requests, row 0 included."""
    return 1 + len(Phase) * max_requests * gates
