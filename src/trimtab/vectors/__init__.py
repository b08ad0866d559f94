"""Steering vectors and probes: what they hold, and the files that they come from."""

from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

__all__ = ["Probe", "SteeringVector", "VectorMetadata"]
