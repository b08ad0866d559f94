"""A worker: the model is steered, its runner drives the runtime, and its start is checked."""
