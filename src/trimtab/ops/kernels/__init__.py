"""Triton kernels, one file each. Needs Triton: import these modules only where a kernel is about to run."""
