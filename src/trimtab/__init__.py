"""Per-request, per-token activation steering inside stock vLLM and Transformers."""

__version__ = "0.1.0"
