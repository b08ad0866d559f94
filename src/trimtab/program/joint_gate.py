"""Gates made of several, and what both sorts are checked for.

    all    factor = product over members of their factors
    any    factor = 1 - product over members of (1 - their factors)

On the device each member is a gate of its own, in a lane of its own. The lanes of one joint gate follow one another in
the order of the forward pass, and each joins its factor to that of the lane before it; so the last has the whole.

    all    whole = own * before
    any    whole = own + before * (1 - own)        to the bit the other where one of them is 0, and 1 where one is 1
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from trimtab.errors import SteeringError
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.schedules import Schedule
from trimtab.sites import GateLimits, Site, site_order
from trimtab.wording import summary

MOST_MEMBERS = 16


class Join(StrEnum):
    """How the factors of several gates become one."""

    ALL = "all"
    ANY = "any"

    @property
    def code(self) -> float:
        """What a lane that is joined to the one before it says on the device; one that is not says 0."""
        return 1.0 if self is Join.ALL else -1.0


@dataclass(frozen=True)
class JointGate:
    """Several different gates whose factors are joined to one. Build it with `joined`, which knows the order."""

    join: Join
    members: tuple[
        ResolvedGate, ...
    ]  # at least two, by site and then by digest; a clock last, by which all is multiplied

    @property
    def site(self) -> Site:
        """From where on the factor exists: where the last probe is read."""
        return self.members[-1].site

    @property
    def label(self) -> str:
        """Under which totals tell of it. No name that can be registered has parentheses."""
        return f"({self.join})"

    @property
    def name(self) -> str:
        """What reports call it, in place of a probe."""
        return self.label

    @property
    def told(self) -> tuple[int, int, int]:
        """As of `ResolvedGate.told`, all members together."""
        told = [member.told for member in self.members]
        return 0, sum(named for _, named, _ in told), sum(labelled for _, _, labelled in told)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of all that decides."""
        members = b"".join(member.digest for member in self.members)
        return hashlib.sha256(f"trimtab joint gate 1\0{self.join}\0".encode() + members).digest()


Condition = ResolvedGate | JointGate
"""What can stand before an intervention."""


def joined(join: Join, members: Sequence[ResolvedGate]) -> Condition:
    """`members` as one gate, whatever their order; one alone is that gate.

    Raises `SteeringError` at the path of a member that equals an earlier one, and without one where there are none.
    """
    if not members:
        raise SteeringError("", "is empty: name at least one gate, or leave the gate out")
    seen: dict[bytes, ResolvedGate] = {}
    for member in members:
        if (known := seen.setdefault(member.digest, member)) is not member:
            raise SteeringError(member.path, f"equals {known.path or 'another one'}: leave one of them out")
    ordered = sorted(members, key=lambda member: (site_order(member.site), member.digest))
    *others, last = sorted(ordered, key=lambda member: member.schedule is not None)
    if not others:
        return last
    if others[-1].schedule is not None:
        raise SteeringError("", "has two schedules")
    if last.schedule is not None and last.site != others[-1].site:
        raise SteeringError("", f"has a schedule at {last.site}, and the last probe is read at {others[-1].site}")
    one = last.schedule is not None and len(others) == 1
    return JointGate(Join.ALL if one else join, (*others, last))


def scheduled(gate: Condition | None, schedule: Schedule, site: Site, width: int) -> Condition:
    """`gate` whose factor is multiplied by that of the schedule; without a gate, the schedule from `site` on."""
    clock = ResolvedGate.clock(schedule, site if gate is None else gate.site, width)
    if gate is None:
        return clock
    return joined(gate.join if isinstance(gate, JointGate) else Join.ALL, [*gate.members, clock])


def schedule_of(gate: Condition | None) -> Schedule | None:
    """The schedule that multiplies the factor of a gate, if any does."""
    return None if gate is None else gate.members[-1].schedule


def is_clock(gate: Condition | None) -> bool:
    """Whether a gate is a schedule and nothing else."""
    return isinstance(gate, ResolvedGate) and gate.schedule is not None


def lanes(gate: Condition) -> list[tuple[ResolvedGate, float]]:
    """The lanes of a gate: of each its own gate, and how it is joined to the lane before it (`Join.code`, or 0)."""
    if isinstance(gate, ResolvedGate):
        return [(gate, 0.0)]
    codes = [gate.join.code if member.schedule is None else Join.ALL.code for member in gate.members]
    return [
        (member, code if place else 0.0) for place, (member, code) in enumerate(zip(gate.members, codes, strict=True))
    ]


def check_gate(gate: Condition, sites: Iterable[Site], width: int) -> None:
    """Raise `SteeringError` at `probe` where a gate cannot stand before what acts at `sites` with vectors [width].

    The factor exists from its last probe's site on, in the order of the forward pass, so a vector may act there and
    later. Of a gate of several the path leads to the member.
    """
    where = tuple(sites)
    for member in gate.members:
        with _below(member):
            _check_member(member, where, width)


def _check_member(gate: ResolvedGate, sites: Sequence[Site], width: int) -> None:
    early = [site for site in sites if site_order(site) < site_order(gate.site)]
    if early:
        raise SteeringError(
            "probe",
            f"is read at {gate.site}, after the vector has acted at {summary(early)}: a gate works from its probe's "
            "site on; narrow the vector with `layers`, or train a probe at an earlier layer",
        )
    if gate.probe.hidden_size != width:
        raise SteeringError("probe", f"has width {gate.probe.hidden_size}, but its vector has {width}")


def is_monitor(gate: Condition, limits: GateLimits) -> bool:
    """Whether a gate is an engine's own, or that times a schedule."""
    first, *others = gate.members
    own = limits.monitor is not None and first.digest == limits.monitor.digest
    return own and all(member.schedule is not None for member in others)


def check_served(gate: Condition, sites: Iterable[Site], limits: GateLimits) -> None:
    """Raise `SteeringError` where an engine with these limits cannot serve `gate` on a vector acting at `sites`.

    A gate that is the engine's monitor is served wherever that is read; as a member of another it is one like all.
    """
    if is_monitor(gate, limits):
        return
    if is_clock(gate) and not limits.count:
        return  # rows have schedules of their own; what needs more is refused by the number of its gates
    if not limits.count:
        raise SteeringError("", "this engine serves no gates: leave the gate out")
    where = tuple(sites)
    for member in gate.members:
        with _below(member):
            _check_member_served(member, where, limits)


def _check_member_served(gate: ResolvedGate, sites: Sequence[Site], limits: GateLimits) -> None:
    if gate.site not in (limits.probe_sites if gate.schedule is None else limits.read_sites):
        readable = sorted(limits.probe_sites, key=site_order)
        raise SteeringError("probe", f"no probe can be read at {gate.site} here, only at {summary(readable)}")
    if not limits.stages:
        return
    stage = limits.stage(gate.site.layer)
    for site in sites:
        if limits.stage(site.layer) != stage:
            boundary = next(first for first in limits.stages if gate.site.layer < first <= site.layer)
            raise SteeringError(
                "probe",
                f"is read at {gate.site}, and the vector acts at {site}, beyond the pipeline stage that ends before "
                f"layer {boundary}: a gate works within one stage; narrow the vector with `layers`, or use a probe "
                f"at layer {boundary} or later",
            )


@contextmanager
def _below(member: ResolvedGate) -> Iterator[None]:
    """Faults of a member are told at its path."""
    try:
        yield
    except SteeringError as error:
        field = f"{member.path}.{error.field}" if member.path else error.field
        raise SteeringError(field, error.message) from None
