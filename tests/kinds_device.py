"""A resolved spec served on the CPU: the runtime writes what a device holds, and the operators read it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from kinds_cases import HERE, Row, resolve
from trimtab.ops import SlotForm, SteeringBuffers, emit
from trimtab.program import ResolvedSteering
from trimtab.responses import RESPONSES
from trimtab.runtime import SteeringRuntime
from trimtab.sites import Site, site_order


def form_of(steering: ResolvedSteering) -> SlotForm:
    """What an engine declares to serve a request."""
    slots = steering.decode.slots
    most = max(sum(site in slot.at for slot in slots) for site in steering.sites)
    names = tuple(name for name in RESPONSES if name in {slot.response for slot in slots})
    return SlotForm(most, names, any(slot.write is not None for slot in slots))


def served(
    streams: Row, *steps: Mapping[str, Any], site: Site = HERE, dtype: torch.dtype = torch.float32, **said: Any
) -> Row:
    """Decode tokens `streams` [N, H] at `site` behind a spec that has no gates there, as an engine leaves them."""
    steering = resolve(*steps, **said)
    width = steering.decode.hidden_size
    sites = sorted({*steering.sites, site}, key=site_order)
    buffers = SteeringBuffers(
        sites, hidden_size=width, max_rows=40, max_tokens=len(streams), dtype=dtype, slots=form_of(steering)
    )
    runtime = SteeringRuntime(buffers, max_requests=2)
    runtime.admit("one", steering)
    runtime.step(["one"], np.array([9]), np.array([len(streams)]), np.array([9]))
    module = nn.Module()
    buffers.attach(module, site)
    out = emit(module, site.hook, torch.from_numpy(streams).to(dtype))
    return out.double().numpy()
