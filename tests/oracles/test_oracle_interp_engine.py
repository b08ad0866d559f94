"""Six kinds at five hook points against interp-engine, with which Neuronpedia serves its models.

Its `resid_mid` is left out: it writes to what the norm behind attention reads, while `post_attn` is the stream itself.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from interp_engine import AblateSpec, AddSpec, NormScaledAddSpec, OrthogonalDecompSpec, ProjectionCapSpec, SwapSpec
from interp_engine import SteeringSpec as Theirs
from interp_engine.model import EagerModel
from interp_engine.steer import SteerMask, steer
from side_by_side import Llama, assert_same, direction

POINTS = {"resid_pre": "pre_attn", "resid_post": "post_block"} | {
    name: name for name in ("attn_out", "mlp_in", "mlp_out")
}
LAYERS = (0, 2)
V, W = direction(1, 0.3), direction(2, 2.0)
UNIT = V / V.norm()

KINDS: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "add": (AddSpec(V, -1.5), {"kind": "add", "scale": -1.5}),
    "add of unit norm": (NormScaledAddSpec(UNIT, 0.8), {"kind": "add", "unit": "norm", "scale": 0.8}),
    "ablate": (AblateSpec(V), {"kind": "ablate"}),
    "scale": (OrthogonalDecompSpec(V, -2.5), {"kind": "scale", "factor": -2.5}),
    "swap": (SwapSpec(V, W), {"kind": "swap"}),
    "cap": (ProjectionCapSpec(V, max=-0.75), {"kind": "clamp", "max": -0.75}),
    "floor": (ProjectionCapSpec(V, min=1.25), {"kind": "clamp", "min": 1.25}),
    "band": (ProjectionCapSpec(V, min=0.5, max=0.6), {"kind": "clamp", "min": 0.5, "max": 0.6}),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_does_what_the_engine_of_neuronpedia_does(model: Llama, kind: str, point: str) -> None:
    operation, step = KINDS[kind]
    where = [Theirs.at(f"{point}.{layer}", operation) for layer in LAYERS]

    def generate(**inputs: Any) -> Any:
        with steer(EagerModel("llama", hf_model=model, tokenizer=object()), where):
            return model.generate(**inputs)

    def everywhere(vector: Any) -> dict[str, Any]:
        return {POINTS[point]: {str(layer): vector.tolist() for layer in LAYERS}}

    to = {"to": everywhere(W)} if kind == "swap" else {}
    assert_same({"interventions": [{**step, **to, "vector": everywhere(V)}]}, generate)


@pytest.mark.parametrize(
    ("generated", "where"),
    [
        (True, {"not": {"prompt": "all", "special_tokens": True}}),
        (False, {"prompt": "all", "special_tokens": False}),
    ],
)
def test_special_tokens_are_left_out_as_there(model: Llama, generated: bool, where: dict[str, Any]) -> None:
    tokenizer = SimpleNamespace(all_special_ids=[5, 8, 21, 80], added_tokens_decoder={}, decode=lambda *_, **__: "")

    def generate(**inputs: Any) -> Any:
        engine = EagerModel("llama", hf_model=model, tokenizer=tokenizer)
        left_out = {"prompt_token_ids": inputs["input_ids"][0], "position_mask": SteerMask.SPECIAL_TOKENS}
        acts = [Theirs.at(f"resid_post.{layer}", AddSpec(V, -1.5)) for layer in LAYERS]
        with steer(engine, acts, **left_out, generated=generated):
            return model.generate(**inputs)

    vector = {"post_block": {str(layer): V.tolist() for layer in LAYERS}}
    step = {"kind": "add", "vector": vector, "scale": -1.5, "where": where}
    assert_same({"interventions": [step]}, generate, tokenizer)
