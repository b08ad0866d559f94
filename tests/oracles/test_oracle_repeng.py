"""`add` and `keep_norm` against the control vectors of repeng (Vogel 2024).

Its `normalize` gives every token behind a controlled layer the length that it had there: `keep_norm`.
"""

import pytest
from repeng import ControlModel, ControlVector
from side_by_side import Llama, assert_same, at, direction

VECTORS = {0: direction(1, 0.4), 2: direction(2, 0.8)}


@pytest.mark.parametrize("strength", [1.5, -0.75])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_control_vector_is_an_addition_with_or_without_its_norm_kept(
    model: Llama, strength: float, normalize: bool
) -> None:
    control = ControlVector("llama", {layer: vector.numpy() for layer, vector in VECTORS.items()})
    controlled = ControlModel(model, list(VECTORS))
    controlled.set_control(control, strength, normalize=normalize)
    step = {"kind": "add", "vector": at(VECTORS), "scale": strength}
    assert_same({"interventions": [step], "keep_norm": normalize}, controlled.generate)
