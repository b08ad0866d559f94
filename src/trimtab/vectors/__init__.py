"""Steering vectors: what they hold, and the files that they come from."""

from trimtab.vectors.vector import SteeringVector, VectorMetadata

__all__ = ["SteeringVector", "VectorMetadata"]
