"""The host side of steering, free of any engine: rows by content, step plans by position, uploads of what changed."""

from trimtab.program.counting import GateUse
from trimtab.program.resolved_gate import probes_needed, rows_needed
from trimtab.runtime.runtime import SteeringRuntime

__all__ = ["GateUse", "SteeringRuntime", "probes_needed", "rows_needed"]
