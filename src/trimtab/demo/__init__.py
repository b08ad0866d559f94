"""The demonstration: a small review language, a model trained on it, and what steering does to that model."""

from pathlib import Path


def model_path() -> Path:
    """Directory of the bundled demonstration model, for `AutoModelForCausalLM.from_pretrained` and its like."""
    return Path(__file__).parent / "model"
