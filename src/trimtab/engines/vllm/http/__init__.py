"""The HTTP server: what stands before vLLM's routes, our own routes, and receipts in answers."""
