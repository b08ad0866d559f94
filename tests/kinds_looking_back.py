"""Steers streams with what a spec comes down to, as engines do: the runtime writes the records, `emit` runs on them."""

from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import nn

from kinds_cases import HERE, H, Row, vector
from trimtab.ops import SteeringBuffers, emit
from trimtab.ops.args import SlotForm
from trimtab.ops.emission import Emission, set_emission
from trimtab.ops.reference import ROWS_ONLY
from trimtab.program import ResolvedSteering
from trimtab.runtime import SteeringRuntime

PROBE = vector(9, scale=0.1)
TOLERANCE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-4}  # of streams of about 100


def steered(
    steering: ResolvedSteering,
    x: Row,
    form: Literal["traced", "opaque"],
    rest: Row | None = None,
    dtype: torch.dtype = torch.float32,
) -> Row:
    """What leaves the site of `kinds_cases` of decode tokens whose stream there is x [N, H]: with `rest` [N, H] the
    stream is their sum, and x leaves."""
    slots = steering.decode.slots
    responses = sorted({slot.response for slot in slots})
    buffers = SteeringBuffers(
        [HERE],
        hidden_size=H,
        max_rows=12,
        max_tokens=len(x),
        dtype=dtype,
        gates=2,
        max_probes=4,
        slots=SlotForm(len(slots), tuple(responses), any(slot.write is not None for slot in slots)) if slots else None,
    )
    module = nn.Module()
    buffers.attach(module, HERE)
    set_emission(module, Emission(traced=form == "traced", terms=ROWS_ONLY))
    runtime = SteeringRuntime(buffers, max_requests=2)
    runtime.admit("a", steering)
    runtime.step(["a"], np.array([3]), np.array([len(x)]), np.array([1]))
    hidden, other = (None if one is None else torch.from_numpy(one).to(dtype) for one in (x, rest))
    with mock.patch("torch.compiler.is_compiling", return_value=form == "traced"):
        return emit(module, HERE.hook, hidden, rest=other).double().numpy()
