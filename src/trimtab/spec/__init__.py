"""What a request may say: the one validator behind every door, and the way from a spec to programs."""

from trimtab.spec.gate import Gate
from trimtab.spec.kinds import Add, Intervention
from trimtab.spec.request import Steering

__all__ = ["Add", "Gate", "Intervention", "Steering"]
