"""`rotate` against the angular steering of pysteer, at the hook point where it stands: the output of a layer.

The paper itself turns at the inputs of norms. pysteer says only where a token is turned `to`; what `by` does is in
tests/test_kind_rotate.py.
"""

from typing import Any

import pytest
import torch
from side_by_side import Llama, assert_same, at, direction
from steering_strategy.AngularSteeringStrategy import AngularSteeringStrategy

FIRST, SECOND = {0: direction(1), 2: direction(2, 3.0)}, {0: direction(3, 0.2), 2: direction(4)}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("degrees", [0.0, 35.0, 90.0, 200.0, -100.0])
def test_a_rotation_to_an_angle_is_angular_steering(model: Llama, degrees: float, adaptive: bool) -> None:
    planes = {layer: (FIRST[layer], SECOND[layer]) for layer in FIRST}
    strategy = AngularSteeringStrategy(planes, adaptive=adaptive, cpu_store_dtype=torch.float32)

    def turned(layer: int, out: torch.Tensor) -> torch.Tensor:
        return strategy.steer(layer, out.clone(), degrees, torch.ones(out.shape[:2]))

    for layer in planes:
        model.model.layers[layer].register_forward_hook(lambda _, __, out, layer=layer: turned(layer, out))
    step: dict[str, Any] = {"kind": "rotate", "vector": at(FIRST), "plane": at(SECOND), "to": degrees}
    assert_same({"interventions": [{**step, "adaptive": adaptive}]}, model.generate)
