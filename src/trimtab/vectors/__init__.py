"""Steering vectors, probes and dictionaries: what they hold, and the files that they come from."""

from trimtab.vectors.content import VectorMetadata
from trimtab.vectors.dictionary import Dictionary, DictionaryRow
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

__all__ = ["Dictionary", "DictionaryRow", "Probe", "SteeringVector", "VectorMetadata"]
