"""What a request may say: the one validator behind every door, and the way from a spec to programs."""

from trimtab.spec.request import Add, Gate, Intervention, Steering

__all__ = ["Add", "Gate", "Intervention", "Steering"]
