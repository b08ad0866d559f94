"""The embedded engine: per-prompt steering inside Transformers, on a laptop or in a notebook."""

from trimtab.engines.transformers.model import SteeredModel
from trimtab.engines.transformers.results import Generation
from trimtab.serving.receipt import Receipt

__all__ = ["Generation", "Receipt", "SteeredModel"]
