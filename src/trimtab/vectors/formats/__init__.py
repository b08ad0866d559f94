"""One file per format: how a vector or a probe is written and read."""
