"""An engine's monitor: one gate of its own before what is done to decode tokens behind no gate of theirs.

A monitor is sugar. Admission puts its gate before the part of each ungated decode term, and slot, that lies at or after
its probe's site; the part before that site keeps its full strength, and so do prompts. Everything else (identity, rows,
receipts, meters, checks) is that of gates.
"""

from collections.abc import Iterator
from dataclasses import replace

from trimtab.program.joint_gate import Condition, is_clock, schedule_of, scheduled
from trimtab.program.programs import PhaseProgram, Term
from trimtab.program.ranges import MIN_VALUE
from trimtab.program.resolved import ResolvedSteering
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.program.slots import Slot
from trimtab.responses import Stage
from trimtab.sites import Phase, Site, site_order
from trimtab.vectors.vector import Part


def behind(steering: ResolvedSteering, monitor: ResolvedGate) -> ResolvedSteering:
    """`steering` in an engine with this `monitor`; the same object where the monitor has no part in it.

    A gate of the request that equals the monitor is the monitor: both open alike, and reports tell of one.
    """
    equal = any(
        item.gate == monitor and item.gate.label != MONITOR_LABEL
        for program in steering.programs
        for item in program.gated
    )
    if not (equal or reaches(steering, monitor.site)):
        return steering
    parted: dict[int, PhaseProgram] = {}
    programs: list[PhaseProgram] = []
    for phase, program in zip(steering.phases, steering.programs, strict=True):
        if phase is Phase.DECODE and id(program) not in parted:
            parted[id(program)] = _parted(program, monitor)
        programs.append(parted[id(program)] if phase is Phase.DECODE else _renamed(program, monitor))
    return _with_origins(steering, replace(steering, programs=tuple(programs)))


def _parted(decode: PhaseProgram, monitor: ResolvedGate) -> PhaseProgram:
    return PhaseProgram.of(
        (part for term in decode.all_terms for part in _parts(term, monitor)),
        (part for slot in decode.slots for part in _slot_parts(slot, monitor)),
    )


def _renamed(program: PhaseProgram, monitor: ResolvedGate) -> PhaseProgram:
    if not any(item.gate == monitor for item in program.gated):
        return program
    gated = tuple(replace(item, gate=monitor) if item.gate == monitor else item for item in program.gated)
    return replace(program, gated=gated)


def _with_origins(before: ResolvedSteering, steering: ResolvedSteering) -> ResolvedSteering:
    """`steering` with the origins of what it still holds: terms may have cancelled behind the monitor's gate.

    Content that stood in the spec has no name that its parts would keep, so it stays as long as there is any.
    """
    gone = _named(before) - _named(steering)
    read = {one.probe.digest for gate in steering.gates if gate.label != MONITOR_LABEL for one in gate.members}
    return replace(
        steering,
        vectors=tuple(one for one in steering.vectors if (None if one.name is None else one.digest) not in gone),
        probes=tuple(one for one in steering.probes if one.direction in read),
    )


def _named(steering: ResolvedSteering) -> set[bytes | None]:
    """The digests by which the vectors are named, None for content."""
    told = [reference for slot in steering.slots for way in slot.directions for _, reference in way.told]
    told += [term.reference for term in steering.terms]
    return {None if reference is None else reference.digest for reference in told}


def reaches(steering: ResolvedSteering, site: Site) -> bool:
    """Whether something is done to decode tokens at `site` or later that stands behind no gate."""
    programs = steering.programs_of(Phase.DECODE)
    last = [term.sites[-1] for program in programs for term in program.all_terms if _waits(term.gate)]
    last += [slot.sites[-1] for program in programs for slot in program.slots if _waits(slot.gate) and _may_wait(slot)]
    return any(site_order(one) >= site_order(site) for one in last)


def monitor_of(steering: ResolvedSteering) -> str:
    """Hex digest of the monitor that stands before what decode tokens receive; "" if none does."""
    gates = (
        one for program in steering.programs_of(Phase.DECODE) for item in program.gated for one in item.gate.members
    )
    return next((gate.digest.hex() for gate in gates if gate.label == MONITOR_LABEL), "")


def _parts(term: Term, monitor: ResolvedGate) -> Iterator[Term]:
    if not _waits(term.gate):
        yield replace(term, gate=monitor) if term.gate == monitor else term
        return
    for part in (Part(monitor.site, True), Part(monitor.site, False)):
        vector = term.vector.part(part)
        if vector is None or abs(term.scale) * vector.max_abs < MIN_VALUE:  # less than can be computed with
            continue
        gate, reference = term.gate if part.before else _behind(monitor, term.gate), term.reference
        if reference is not None and vector is not term.vector:
            reference = replace(reference, part=part)
        yield Term(vector, term.scale, reference, gate, term.asked_by)


def _waits(gate: Condition | None) -> bool:
    """Whether what stands behind `gate` stands behind the monitor: behind no gate, or a schedule alone."""
    return gate is None or is_clock(gate)


def _behind(monitor: ResolvedGate, clock: Condition | None) -> Condition:
    """The monitor, times a schedule where there is one."""
    schedule = schedule_of(clock)
    return monitor if schedule is None else scheduled(monitor, schedule, monitor.site, monitor.probe.hidden_size)


def _may_wait(slot: Slot) -> bool:
    """Whether a gate can stand before a slot: one that acts on what others have done does nothing where they do not."""
    return slot.stage is not Stage.LAST


def _slot_parts(slot: Slot, monitor: ResolvedGate) -> Iterator[Slot]:
    """The numbers of a slot before and behind the monitor; its directions stay whole, so that both share their rows."""
    if not _waits(slot.gate) or not _may_wait(slot):
        yield replace(slot, gate=monitor) if slot.gate == monitor else slot
        return
    late = [site_order(site) >= site_order(monitor.site) for site in slot.sites]
    for gate, behind in ((slot.gate, False), (_behind(monitor, slot.gate), True)):
        numbers = tuple(one for one, is_late in zip(slot.numbers, late, strict=True) if is_late is behind)
        if numbers:
            yield replace(slot, numbers=numbers, gate=gate)
