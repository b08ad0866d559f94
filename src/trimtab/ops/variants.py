"""Counts compiled kernel variants, and notices those that warm-up missed.

Triton compiles a variant per combination of constants, dtypes, alignments and integer classes. One that appears in
service costs a request tens of milliseconds, so after warm-up each new one is logged with its key and counted.
"""

import logging
from typing import Any

logger = logging.getLogger(__name__)

_watched: dict[str, tuple[Any, set[Any]]] = {}
_late = 0


def compiled_variants(kernel: Any) -> int:
    """How many variants of a Triton `kernel` this process holds, over all devices.

    Raises RuntimeError where the kernel has neither of the caches that we know: a count of 0 would hide what it is for.
    """
    return sum(map(len, _variants(kernel).values()))


def variant_keys(kernel: Any) -> set[Any]:
    """The keys of those variants: (device, Triton's own key)."""
    return {(device, key) for device, variants in _variants(kernel).items() for key in variants}


def _variants(kernel: Any) -> dict[Any, Any]:
    """The variants on each device, by Triton's own keys."""
    if hasattr(kernel, "device_caches"):  # from Triton 3.3 on: device -> (variants, ...)
        return {device: caches[0] for device, caches in kernel.device_caches.items()}
    if hasattr(kernel, "cache"):  # before: device -> variants
        return dict(kernel.cache)
    raise RuntimeError(
        f"{kernel!r} has neither `device_caches` nor `cache`: this Triton keeps compiled variants elsewhere, "
        f"and trimtab {__name__} must learn where"
    )


def watch(kernel: Any) -> None:
    """Warm-up of `kernel` is over: from now on every new variant is late. Variants present now are not."""
    _watched[kernel.__name__] = (kernel, variant_keys(kernel))


def pause(kernel: Any) -> None:
    """Warm-up of `kernel` begins: variants compiled until `watch` are expected."""
    _watched.pop(kernel.__name__, None)


def note_launch(kernel: Any) -> None:
    """To be called after each launch: counts and logs the variants that a watched kernel has gained."""
    global _late
    if kernel.__name__ not in _watched:
        return
    _, known = _watched[kernel.__name__]
    if compiled_variants(kernel) == len(known):
        return
    for key in variant_keys(kernel) - known:
        known.add(key)
        _late += 1
        logger.warning("%s was compiled after warm-up (variant %d of it): %s", kernel.__name__, len(known), key)


def late_variants() -> int:
    """How many variants were compiled after warm-up in this process: the value of a metric, 0 in a healthy server."""
    return _late
