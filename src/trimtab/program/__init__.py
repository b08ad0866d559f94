"""What a spec comes down to once its names are known: programs per phase, their identity, and their way as bytes."""

from trimtab.program.programs import EMPTY, GatedProgram, PhaseProgram, Term
from trimtab.program.ranges import fault_of_range
from trimtab.program.resolved import SPANS, Asked, Origin, ResolvedSteering, Where
from trimtab.program.slots import Direction, Numbers, Slot
from trimtab.program.spans import Spans

__all__ = [
    "EMPTY",
    "SPANS",
    "Asked",
    "Direction",
    "GatedProgram",
    "Numbers",
    "Origin",
    "PhaseProgram",
    "ResolvedSteering",
    "Slot",
    "Spans",
    "Term",
    "Where",
    "fault_of_range",
]
