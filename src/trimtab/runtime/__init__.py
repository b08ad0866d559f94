"""The host side of steering, free of any engine: rows by content, step plans by position, uploads of what changed."""

from trimtab.runtime.runtime import SteeringRuntime

__all__ = ["SteeringRuntime"]
