"""The engine core: what a request carries is checked, and steered KV is kept apart."""
