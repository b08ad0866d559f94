"""A dictionary holds named rows of an autoencoder, and refuses what its rows do not determine."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from trimtab import Dictionary, SteeringError, SteeringVector
from trimtab.sites import HookPoint, Site
from trimtab.vectors import DictionaryRow

HERE = Site(2, HookPoint.POST_BLOCK)
H, F = 6, 4
RANDOM = np.random.default_rng(0)
ENCODER, DECODER = RANDOM.normal(size=(H, F)), RANDOM.normal(size=(F, H))
BIAS, GATE_BIAS, R_MAG = RANDOM.normal(size=(3, F))
TAKEN = RANDOM.normal(size=H)
WEIGHTS: dict[str, Any] = {"encoder": ENCODER, "decoder": DECODER, "bias": BIAS}
THERE = SteeringVector({Site(3, HookPoint.POST_BLOCK): [1.0] * H})


def row(**own: Any) -> DictionaryRow:
    vector = SteeringVector({HERE: [1.0] * H})
    return DictionaryRow(**({"encoder": vector, "decoder": vector} | own))


def test_rows_are_columns_of_the_encoder_and_rows_of_the_decoder() -> None:
    found = Dictionary.from_weights("relu", HERE, {"cats": 2, "dogs": 0}, **WEIGHTS)
    assert (found.architecture, found.site, list(found), len(found)) == ("relu", HERE, ["cats", "dogs"], 2)
    np.testing.assert_array_equal(found["cats"].encoder.directions[HERE], ENCODER[:, 2].astype(np.float32))
    np.testing.assert_array_equal(found["cats"].decoder.directions[HERE], DECODER[2].astype(np.float32))
    assert found["cats"].bias == BIAS[2]


def test_what_is_taken_off_the_input_becomes_part_of_the_biases() -> None:
    told = {**WEIGHTS, "gate_bias": GATE_BIAS, "r_mag": R_MAG, "subtracted": TAKEN}
    found = Dictionary.from_weights("gated", HERE, {"cats": 3}, **told)["cats"]
    x = RANDOM.normal(size=H)
    z, gain = (x - TAKEN) @ ENCODER[:, 3], np.exp(R_MAG[3])
    assert found.gain == pytest.approx(gain)
    assert found.bias + gain * (x @ ENCODER[:, 3]) == pytest.approx(gain * z + BIAS[3])
    assert found.gate_bias + x @ ENCODER[:, 3] == pytest.approx(z + GATE_BIAS[3])


def test_weights_may_be_tensors_of_any_dtype_and_a_threshold_one_number() -> None:
    weights = {name: torch.from_numpy(value).bfloat16().requires_grad_() for name, value in WEIGHTS.items()}
    found = Dictionary.from_weights("jumprelu", HERE, {"cats": 1}, **weights, threshold=0.5)["cats"]
    assert found.threshold == 0.5
    np.testing.assert_array_equal(found.encoder.directions[HERE], weights["encoder"].detach()[:, 1].float().numpy())


def test_it_can_be_copied_and_sent_to_another_process() -> None:
    given = Dictionary.from_weights("relu", HERE, {"cats": 2}, **WEIGHTS)
    for found in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert found.architecture == "relu"
        assert found["cats"].encoder.digest == given["cats"].encoder.digest
        assert found["cats"].bias == given["cats"].bias


REFUSED = {
    "topk": (lambda: Dictionary("topk", {"a": row()}), "architecture", "depends on all rows"),
    "batch topk": (lambda: Dictionary("BatchTopK", {"a": row()}), "architecture", "with the threshold"),
    "unknown": (lambda: Dictionary("relus", {"a": row()}), "architecture", "did you mean 'relu'"),
    "empty": (lambda: Dictionary("relu", {}), "rows", "at least one"),
    "no name": (lambda: Dictionary("relu", {"": row()}), "rows['']", "want a name"),
    "threshold": (lambda: Dictionary("jumprelu", {"a": row()}), "rows['a'].threshold", "required"),
    "another's": (lambda: Dictionary("relu", {"a": row(gain=1.0)}), "rows['a'].gain", "belongs to gated"),
    "not a number": (lambda: Dictionary("relu", {"a": row(bias=math.nan)}), "rows['a'].bias", "finite"),
    "no vector": (lambda: Dictionary("relu", {"a": row(encoder=[1.0])}), "rows['a'].encoder", "SteeringVector"),
    "elsewhere": (
        lambda: Dictionary("relu", {"a": row(), "b": row(decoder=THERE)}),
        "rows['b'].decoder", "post_block:3",
    ),
    "width": (
        lambda: Dictionary("relu", {"a": row(decoder=SteeringVector({HERE: [1.0]}))}), "rows['a'].decoder", "width 1",
    ),
    "transposed": (lambda: weights(encoder=ENCODER.T), "decoder", "want [F, H] beside [H, F]"),
    "index": (lambda: Dictionary.from_weights("relu", HERE, {"a": F}, **WEIGHTS), "rows['a']", "one of 4 features"),
    "negative": (lambda: Dictionary.from_weights("relu", HERE, {"a": -1}, **WEIGHTS), "rows['a']", "one of 4 features"),
    "biases": (lambda: weights(bias=BIAS[:2]), "bias", "want [4]"),
    "no bias": (lambda: weights(bias=None), "bias", "want numbers"),
    "subtracted": (lambda: weights(subtracted=BIAS), "subtracted", "want [6]"),
    "infinite": (lambda: weights(encoder=ENCODER * np.inf), "[0]", "finite"),
}  # fmt: skip


def weights(**own: Any) -> Dictionary:
    return Dictionary.from_weights("relu", HERE, {"a": 0}, **{**WEIGHTS, **own})


@pytest.mark.parametrize(("made", "field", "message"), REFUSED.values(), ids=REFUSED)
def test_faults_name_what_is_wrong(made: Any, field: str, message: str) -> None:
    with pytest.raises(SteeringError) as caught:
        made()
    assert caught.value.field.endswith(field)
    assert message in caught.value.message
