"""Gates that are run as probes of rows, by the row monitor of the operator.

A row may have a probe at a site, by which what decode tokens receive of it there is multiplied. That is all that a gate
does which opens gradually, is not inverted and lets through a sum at its own probe's site alone. So where an engine
lowers gates, such a sum of decode tokens joins the ungated one in its row, unless that has content at the site, and the
row has the probe. The gate then needs no lane and no row of its own; what it does is not metered.

A program with slots is left as it is. This is how a request is run, not what it is: no identity knows of it. Whoever
must know which rows a request will hold asks `contents_of`.
"""

from collections.abc import Sequence, Set
from typing import NamedTuple

from trimtab.program.joint_gate import JointGate, schedule_of
from trimtab.program.programs import GatedProgram, PhaseProgram
from trimtab.program.resolved import ResolvedSteering
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.schedules import Schedule
from trimtab.sites import Phase, Site, site_order

SMALLEST_SHARE = 2.0**-16
"""Of the size of all that shares a row: less would lose digits in a float16 table, whose rows have one unit each."""


class Placed(NamedTuple):
    """Where the sums of one phase go."""

    row: PhaseProgram  # what its `terms` add is the content of the phase's row
    probes: tuple[ResolvedGate, ...]  # of that row, in forward order; at most one per site
    gated: tuple[GatedProgram, ...]  # those that have a lane, and a row, of their own
    schedule: Schedule | None = None  # by which the whole row is multiplied


class Contents(NamedTuple):
    """The keys of all that a request holds on the device at one time."""

    rows: Set[bytes]
    probes: Set[bytes]  # of lanes; the probes of rows are part of their keys


def placed(steering: ResolvedSteering, *, lowers: bool) -> tuple[Placed, ...]:
    """Where the sums of each program go in an engine that lowers gates of decode tokens, or does not."""
    return tuple(
        _scheduled(program)
        or (lowered(program) if lowers and phase == Phase.DECODE else Placed(program, (), program.gated))
        for phase, program in zip(steering.phases, steering.programs, strict=True)
    )


def _scheduled(program: PhaseProgram) -> Placed | None:
    """Where the sums of a program go of which the device multiplies the row, and no lane has to."""
    if (item := program.scheduled_row) is None:
        return None
    others = tuple(one for one in program.gated if one is not item)
    return Placed(item.total, (), others, schedule_of(item.gate))


def contents_of(steering: ResolvedSteering, *, lowers: bool) -> Contents:
    """What a request with `steering` holds on the device, the same in every process and on every rank."""
    return contents(placed(steering, lowers=lowers))


def contents(phases: Sequence[Placed]) -> Contents:
    """The same of a request whose sums are placed."""
    lanes = [item for phase in phases for item in phase.gated]
    rows = {*(row_key(phase.row, phase.probes) for phase in phases), *(row_key(item.total) for item in lanes)}
    rows |= {way.row_key for phase in phases for slot in phase.row.slots for way in slot.rows}
    probes = {gate.probe.digest for item in lanes for gate in item.gate.members}
    return Contents(frozenset(rows - {b""}), frozenset(probes))


def row_key(program: PhaseProgram, probes: Sequence[ResolvedGate] = ()) -> bytes:
    """The key of the row that holds the terms of `program` behind `probes`; b"" for row 0."""
    return program.row_key and program.row_key + b"".join(gate.digest for gate in probes)


def lowered(decode: PhaseProgram) -> Placed:
    """Where the sums of a program of decode tokens go once its gates are probes of its row as far as they can be."""
    if decode.slots:  # they act on what gated sums have added, and may share their gates
        return Placed(decode, (), decode.gated)
    taken: dict[Site, GatedProgram] = {}
    steered = {site for term in decode.terms for site in term.vector.sites}
    for item in decode.gated:
        gate = item.gate
        if isinstance(gate, JointGate) or gate.hard or gate.invert or gate.schedule is not None:
            continue
        if item.total.sites != (gate.site,) or gate.site in steered:
            continue
        taken.setdefault(gate.site, item)
    ordered = [taken[site] for site in sorted(taken, key=site_order)]
    parts = [decode, *(item.total for item in ordered)]
    if not ordered or not _keep_their_digits(parts):
        return Placed(decode, (), decode.gated)
    probes = tuple(gate for item in ordered for gate in item.gate.members)
    left = tuple(item for item in decode.gated if taken.get(item.gate.site) is not item)
    return Placed(PhaseProgram.joined(parts), probes, left)


def _keep_their_digits(parts: list[PhaseProgram]) -> bool:
    sizes = [abs(term.scale) * term.vector.max_abs for part in parts for term in part.terms]
    return min(sizes) >= SMALLEST_SHARE * sum(sizes)
