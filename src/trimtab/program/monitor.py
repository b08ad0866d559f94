"""An engine's monitor: one gate of its own before what decode tokens receive behind no gate of theirs.

A monitor is sugar. Admission puts its gate before the part of each ungated decode term that lies at or after its
probe's site; the part before that site keeps its full strength, and so do prompts. Everything else (identity, rows,
receipts, meters, checks) is that of gates.
"""

from collections.abc import Iterator
from dataclasses import replace

from trimtab.program.programs import PhaseProgram, Term
from trimtab.program.ranges import MIN_VALUE
from trimtab.program.resolved import ResolvedSteering
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate
from trimtab.sites import Site, site_order
from trimtab.vectors.vector import Part

LABEL = MONITOR_LABEL


def behind(steering: ResolvedSteering, monitor: ResolvedGate) -> ResolvedSteering:
    """`steering` in an engine with this `monitor`; the same object where the monitor has no part in it.

    A gate of the request that equals the monitor is the monitor: both open alike, and reports tell of one.
    """
    equal = any(
        item.gate == monitor and item.gate.label != LABEL for program in steering.programs for item in program.gated
    )
    if not (equal or reaches(steering, monitor.site)):
        return steering
    prefill = _renamed(steering.prefill, monitor)
    decode = PhaseProgram.of(part for term in steering.decode.all_terms for part in _parts(term, monitor))
    return _with_origins(replace(steering, programs=(prefill, decode)))


def _renamed(program: PhaseProgram, monitor: ResolvedGate) -> PhaseProgram:
    if not any(item.gate == monitor for item in program.gated):
        return program
    gated = tuple(replace(item, gate=monitor) if item.gate == monitor else item for item in program.gated)
    return replace(program, gated=gated)


def _with_origins(steering: ResolvedSteering) -> ResolvedSteering:
    """`steering` with the origins of what it still holds: terms may have cancelled behind the monitor's gate.

    Content that stood in the spec has no name that its parts would keep, so it stays as long as there is any.
    """
    named = {term.reference.digest for term in steering.terms if term.reference is not None}
    unnamed = any(term.reference is None for term in steering.terms)
    read = {gate.probe.digest for gate in steering.gates if gate.label != LABEL}
    return replace(
        steering,
        vectors=tuple(one for one in steering.vectors if (unnamed if one.name is None else one.digest in named)),
        probes=tuple(one for one in steering.probes if one.direction in read),
    )


def reaches(steering: ResolvedSteering, site: Site) -> bool:
    """Whether decode tokens receive something at `site` or later that stands behind no gate."""
    return any(site_order(term.vector.sites[-1]) >= site_order(site) for term in steering.decode.terms)


def monitor_of(steering: ResolvedSteering) -> str:
    """Hex digest of the monitor that stands before what decode tokens receive; "" if none does."""
    return next((item.gate.digest.hex() for item in steering.decode.gated if item.gate.label == LABEL), "")


def _parts(term: Term, monitor: ResolvedGate) -> Iterator[Term]:
    if term.gate is not None:
        yield replace(term, gate=monitor) if term.gate == monitor else term
        return
    for part in (Part(monitor.site, True), Part(monitor.site, False)):
        vector = term.vector.part(part)
        if vector is None or abs(term.scale) * vector.max_abs < MIN_VALUE:  # less than can be computed with
            continue
        gate, reference = None if part.before else monitor, term.reference
        if reference is not None and vector is not term.vector:
            reference = replace(reference, part=part)
        yield Term(vector, term.scale, reference, gate)
