"""Which versions of vLLM are steered, and the check that the one here is."""

from trimtab.engines.vllm.patches.patching import require_installed
from trimtab.errors import SteeringError

SUPPORTED = ((0, 26), (0, 34))  # from, up to and not including


def version_fault(version: str) -> str | None:
    """Why vLLM of this version is not steered; None if it is one that steering was written for."""
    found = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    low, high = SUPPORTED
    if low <= found < high:
        return None
    return f"vLLM {version} is not supported: versions {low[0]}.{low[1]} to {high[0]}.{high[1] - 1} are"


def require_supported() -> None:
    """Raise `SteeringError` where this vLLM is not one that steering was written for.

    Imports what the engine core and the front end use, so that their patches are applied and checked. What workers use
    is checked in the workers: each is asked whether it is attached.
    """
    import vllm

    if (fault := version_fault(vllm.__version__)) is not None:
        raise SteeringError("steering", fault)
    require_installed()
