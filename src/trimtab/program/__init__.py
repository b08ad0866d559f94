"""What a spec comes down to once its names are known: programs per phase, their identity, and their way as bytes."""

from trimtab.program.programs import (
    EMPTY,
    SPANS,
    GatedProgram,
    Origin,
    PhaseProgram,
    ResolvedSteering,
    Term,
    fault_of_range,
)

__all__ = ["EMPTY", "SPANS", "GatedProgram", "Origin", "PhaseProgram", "ResolvedSteering", "Term", "fault_of_range"]
