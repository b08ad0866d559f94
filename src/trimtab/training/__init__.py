"""What needs a model that generates as well as reads: trying vectors, and choosing their layer and strength."""

from trimtab.training.tuning import TunedVector, tune_vector

__all__ = ["TunedVector", "tune_vector"]
