"""Sets of directions, shares of a state, additions in units of the stream, and hard gates against repsteer.

It takes a subspace out by the pseudo-inverse of its rows, whatever their lengths and angles.
"""

from collections.abc import Callable
from typing import Any

import pytest
import repsteer
import torch
from repsteer.positions import AllTokens
from side_by_side import Llama, assert_same, at, direction

PHASES = {"all": "both", "prefill": "prefill", "decode": "decode"}
LAYER = 1
V = direction(1)
OVERLAPPING = torch.stack([V, V + 0.7 * direction(2), direction(3, 4.0)])
PROBE, BIAS = direction(26, 0.5), 0.2


def generating(
    model: Llama, phase: str, artifact: Any, operator: Any, strength: Any, **more: Any
) -> Callable[..., Any]:
    """A `generate` under one of its interventions behind a layer."""
    wrapped = repsteer.models.from_model(model)

    def known(kind: Any, *content: Any) -> Any:
        site = repsteer.sites.resid_post(LAYER)
        about = {"model_id": wrapped.model_id, "architecture": wrapped.architecture, "site": site}
        return kind(repsteer.ArtifactMetadata(**about), *content)

    if "gate" in more:
        asked = repsteer.gates.ProbeGate(known(repsteer.ProbeArtifact, PROBE, BIAS), reduction="none")
        more["gate"] = more["gate"](asked)
    schedule = repsteer.schedules.Constant(strength) if isinstance(strength, float) else strength
    plan = repsteer.Intervention(known(*artifact), operator, AllTokens(), schedule, phase=PHASES[phase], **more)

    def generate(**inputs: Any) -> Any:
        with wrapped.steer(plan, compatibility="architecture"):
            return wrapped.generate(**inputs).raw

    return generate


def along(vector: torch.Tensor) -> tuple[Any, torch.Tensor]:
    return repsteer.DirectionArtifact, vector


@pytest.mark.parametrize("phase", PHASES)
def test_a_set_of_overlapping_directions_is_taken_out_like_a_subspace(model: Llama, phase: str) -> None:
    subspace = (repsteer.SubspaceArtifact, OVERLAPPING)
    steps = [{"kind": "ablate", "vector": at([LAYER], row), "strength": 0.75, "phase": phase} for row in OVERLAPPING]
    generate = generating(model, phase, subspace, repsteer.operators.RemoveProjection(), 0.75)
    assert_same({"interventions": steps}, generate)


@pytest.mark.parametrize("phase", PHASES)
def test_a_share_of_the_stream_is_replaced(model: Llama, phase: str) -> None:
    step = {"kind": "replace", "vector": at([LAYER], V), "amount": 0.4, "phase": phase}
    assert_same({"interventions": [step]}, generating(model, phase, along(V), repsteer.operators.Replace(), 0.4))


@pytest.mark.parametrize("phase", PHASES)
def test_an_addition_is_a_share_of_the_norm_of_the_stream(model: Llama, phase: str) -> None:
    step = {"kind": "add", "vector": at([LAYER], V), "unit": "norm", "scale": -0.6, "phase": phase}
    share = repsteer.schedules.NormRelative(-0.6)
    generate = generating(model, phase, along(V / V.norm()), repsteer.operators.Add(), share)
    assert_same({"interventions": [step]}, generate)


@pytest.mark.parametrize("invert", [False, True])  # each lets some tokens of every prompt through
def test_a_probe_is_asked_about_each_token(model: Llama, invert: bool) -> None:
    gate = {"probe": at([LAYER], PROBE), "threshold": -BIAS, "hard": True, "invert": invert}
    step = {"kind": "add", "vector": at([LAYER], V), "scale": 2.0, "gate": gate}
    asked = repsteer.gates.NotGate if invert else lambda gate: gate
    assert_same(
        {"interventions": [step]}, generating(model, "all", along(V), repsteer.operators.Add(), 2.0, gate=asked)
    )
