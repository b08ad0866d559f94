"""The dose of a vector: how long what it adds is, beside the stream that it is added to.

    dose = sum over sites of |scale| * |vector| / (median norm of the stream there)

A scale means nothing by itself: 1.5 may be a nudge in one model and noise in another. The median is taken over the
tokens of the prompts that the vector came from, the first of each left out, since models park huge activations there.
"""

import math
from collections.abc import Collection
from dataclasses import replace

from trimtab.sites import HookPoint, Site
from trimtab.vectors.vector import SteeringVector

DOSE_LIMIT = "dose_limit"  # of the metadata: the largest dose at which text was found intact
STREAM_NORM = "stream_norm."  # of the metadata: before HOOK.LAYER, the median norm of the stream there
LARGEST_UNTRIED_DOSE = 1.0  # as long as the stream itself


def stream_norm_key(site: Site) -> str:
    """The key of the metadata that holds the stream's median norm at `site`."""
    return f"{STREAM_NORM}{site.hook.value}.{site.layer}"


def says_norms(vector: SteeringVector) -> bool:
    """Whether the metadata of `vector` hold a norm of the stream anywhere."""
    return any(key.startswith(STREAM_NORM) for key in vector.metadata.extra)


def without_stream_norms(vector: SteeringVector) -> SteeringVector:
    """The same vector saying nothing of streams, so that a dose of it is one by the engine's norms alone: for places
    that know vectors by the digest of their numbers, and could not tell it from another with other norms."""
    if not says_norms(vector):
        return vector
    kept = {key: value for key, value in vector.metadata.extra.items() if not key.startswith(STREAM_NORM)}
    return vector.with_metadata(replace(vector.metadata, extra=kept))


def stream_site(site: Site, served: Collection[Site]) -> Site:
    """Where the stream that `site` acts on is measured: a branch is measured by the stream that it joins.

    Behind the attention that stream is at `post_attn`, or, where the model has no such site among `served`, at the
    layer's end, where attention and MLP are added at once.
    """
    if site.hook is HookPoint.ATTN_OUT and (between := Site(site.layer, HookPoint.POST_ATTN)) in served:
        return between
    branch = site.hook in (HookPoint.ATTN_OUT, HookPoint.MLP_OUT)
    return Site(site.layer, HookPoint.POST_BLOCK) if branch else site


def stream_norm(vector: SteeringVector, site: Site) -> float | None:
    """The median norm of the stream at `site`, or None where the metadata of `vector` do not say what it is."""
    norm = _number(vector, stream_norm_key(site))
    return norm if norm is not None and norm > 0.0 else None


def dose_of(vector: SteeringVector, scale: float = 1.0) -> float | None:
    """The dose of `scale` times `vector`, or None where its metadata do not say how long the stream is."""
    total = 0.0
    for site, norm in vector.norms().items():
        if (stream := stream_norm(vector, site)) is None:
            return None
        total += abs(scale) * norm / stream
    return total


def dose_warning(vector: SteeringVector, scale: float = 1.0) -> str | None:
    """What to tell a person whose dose is beyond what leaves text intact; None where it is not, or nothing is known."""
    dose, tried = dose_of(vector, scale), _number(vector, DOSE_LIMIT)
    limit = LARGEST_UNTRIED_DOSE if tried is None else tried
    if dose is None or dose <= limit * (1 + 1e-6):
        return None
    known = f"text was found intact up to {tried:.2g}" if tried is not None else "no dose of it was tried"
    return f"scale {scale:g} is a dose of {dose:.2g} stream norms, and {known}: expect broken text"


def _number(vector: SteeringVector, key: str) -> float | None:
    try:
        value = float(vector.metadata.extra[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None
