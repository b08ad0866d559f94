"""`add` and `ablate` against the operators of steering-vectors (Chanin 2024)."""

from functools import partial
from typing import Any

import pytest
from side_by_side import Llama, assert_same, at, direction
from steering_vectors import SteeringVector, ablation_operator, ablation_then_addition_operator, addition_operator

VECTORS = {0: direction(1, 0.4), 1: direction(2, 0.6), 2: direction(3, 0.8)}
ADD = {"kind": "add", "vector": at(VECTORS)}
ABLATE = {"kind": "ablate", "vector": at(VECTORS)}
# What it ablates and adds at once it measures on the stream before the addition: the projection becomes the vector's
# length. Ours measures behind what is added, so there it is set to that length.
SET = [
    {"kind": "clamp", "vector": at({layer: vector}), "value": float(vector.norm())} for layer, vector in VECTORS.items()
]


def applied(model: Llama, operator: Any, multiplier: float, **inputs: Any) -> Any:
    activations = {layer: vector.clone() for layer, vector in VECTORS.items()}
    with SteeringVector(activations, "decoder_block").apply(model, operator=operator, multiplier=multiplier):
        return model.generate(**inputs)


@pytest.mark.parametrize("multiplier", [1.0, -1.5])
def test_a_multiplier_is_the_scale_of_an_addition(model: Llama, multiplier: float) -> None:
    for operator in (None, addition_operator()):
        assert_same({"interventions": [{**ADD, "scale": multiplier}]}, partial(applied, model, operator, multiplier))


@pytest.mark.parametrize("multiplier", [1.0, 3.0])
def test_ablation_takes_out_the_whole_projection_whatever_the_multiplier(model: Llama, multiplier: float) -> None:
    assert_same({"interventions": [ABLATE]}, partial(applied, model, ablation_operator(), multiplier))


def test_ablation_and_then_addition_sets_a_projection_to_the_length_of_the_vector(model: Llama) -> None:
    assert_same({"interventions": SET}, partial(applied, model, ablation_then_addition_operator(), 1.0))


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"min_token_index": 1}, {"prompt": [[1, None]], "answer": "all"}),
        ({"token_indices": [1]}, {"prompt": [[1, 2]]}),
        ({"token_indices": slice(0, 2)}, {"prompt": [[0, 2]]}),
    ],
    ids=str,
)
def test_indices_of_tokens_are_positions_where_each_pass_holds_them_all(model: Llama, asked: Any, where: Any) -> None:
    def generate(**inputs: Any) -> Any:
        activations = {layer: vector.clone() for layer, vector in VECTORS.items()}
        patch = SteeringVector(activations, "decoder_block").patch_activations(model, **asked)
        try:
            return model.generate(**inputs, use_cache=False)
        finally:
            patch.remove()

    assert_same({"interventions": [{**ADD, "where": where}]}, generate)
