"""Everything that a spec may get wrong is refused by a message that names the place and what would be right."""

import base64
import json
import math
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest

from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.spec import Add, Steering
from trimtab.vectors import SteeringVector

H = 4
MODEL = ModelSites(H, 4, frozenset(Site(layer, hook) for layer in (0, 1, 2, 3) for hook in (HookPoint.POST_BLOCK,)))
PARTIAL = ModelSites(H, 4, frozenset({Site(1, HookPoint.POST_BLOCK), Site(2, HookPoint.PRE_ATTN)}))
VECTORS = {
    "calm": SteeringVector({Site(layer, HookPoint.POST_BLOCK): [1.0, 2.0, 3.0, 4.0] for layer in (1, 2)}),
    "wide": SteeringVector({Site(1, HookPoint.POST_BLOCK): [1.0] * 6}),
    "deep": SteeringVector({Site(9, HookPoint.POST_BLOCK): [1.0] * H}),
    "mlp": SteeringVector({Site(1, HookPoint.MLP_IN): [1.0] * H}),
}


def packed(**changes: Any) -> dict[str, Any]:
    data = np.arange(2 * H, dtype="<f4").tobytes()
    body = {"dtype": "float32", "shape": [2, H], "layer_indices": [1, 2], "data": base64.b64encode(data).decode()}
    return {key: value for key, value in (body | changes).items() if value is not None}


def add(**keys: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": "calm"}, {"kind": "add", "vector": "calm"} | keys]}


def inline(**changes: Any) -> dict[str, Any]:
    return add(vector={"post_block": packed(**changes)})


def f32(*numbers: float) -> str:
    return base64.b64encode(np.array(numbers, "<f4").tobytes()).decode()


NAN_IN_ROW_1 = f32(*range(6), math.nan, 0)
V = "interventions[1].vector"

# (spec, field path, what the message must say)
REFUSED_IN_FORM = {
    "not an object": ([], "", "want an object"),
    "no interventions": ({}, "interventions", "required"),
    "empty list": ({"interventions": []}, "interventions", "nothing would be steered"),
    "not a list": ({"interventions": {"kind": "add"}}, "interventions", "want a list"),
    "unknown top key": ({"interventions": [], "intervention": 1}, "intervention", "did you mean 'interventions'"),
    "where of no intervention": (add() | {"where": {}}, "where", "belongs into an intervention"),
    "an intervention alone": ({"kind": "add", "vector": "calm"}, "kind", "belongs into an intervention"),
    "keep_norm of an intervention": (add(keep_norm=True), "interventions[1].keep_norm", "beside `interventions`"),
    "too many": ({"interventions": [{"kind": "add", "vector": "calm"}] * 17}, "interventions", "at most 16"),
    "intervention is no object": ({"interventions": ["calm"]}, "interventions[0]", "want an object"),
    "no kind": ({"interventions": [{"vector": "calm"}]}, "interventions[0].kind", "required"),
    "unknown kind": (add(kind="ad"), "interventions[1].kind", "did you mean 'add'"),
    "kind of another type": (add(kind=[1]), "interventions[1].kind", "the kinds are add"),
    "misspelt key": (add(scal=1.0), "interventions[1].scal", "did you mean 'scale'"),
    "misspelt vector": ({"interventions": [{"kind": "add", "vectr": "x"}]}, "interventions[0].vectr", "'vector'"),
    "no vector": ({"interventions": [{"kind": "add"}]}, "interventions[0].vector", "required"),
    "boolean scale": (add(scale=True), "interventions[1].scale", "got True, want a number"),
    "scale in a string": (add(scale="2"), "interventions[1].scale", "got '2', want a number"),
    "NaN scale": (add(scale=math.nan), "interventions[1].scale", "finite"),
    "infinite scale": (add(scale=-math.inf), "interventions[1].scale", "finite"),
    "scale beyond float32": (add(scale=10**400), "interventions[1].scale", "finite"),
    "scale of endless digits": (add(scale=10**5000), "interventions[1].scale", "finite"),
    "null scale": (add(scale=None), "interventions[1].scale", "want a number"),
    "unknown phase": (add(phase="decoding"), "interventions[1].phase", "'all', 'prefill' or 'decode'"),
    "layers is a number": (add(layers=3), "interventions[1].layers", "want a list of layers"),
    "layers is empty": (add(layers=[]), "interventions[1].layers", "nothing would be steered"),
    "negative layer": (add(layers=[1, -1]), "interventions[1].layers[1]", "whole number from 0"),
    "boolean layer": (add(layers=[True]), "interventions[1].layers[0]", "whole number from 0"),
    "fractional layer": (add(layers=[1.0]), "interventions[1].layers[0]", "whole number from 0"),
    "layer named twice": (add(layers=[2, 1, 2]), "interventions[1].layers[2]", "twice"),
    "too many layers": (add(layers=range(10**9)), "interventions[1].layers", "at most 1024"),
    "too many rows": (
        add(vector={"post_block": {str(layer): [1.0] for layer in range(7000)}}),
        f"{V}.post_block",
        "7000 sites are too many",
    ),
    "too many packed rows": (inline(shape=[1 << 22, 1]), f"{V}.post_block.shape", "4194304 sites are too many"),
    "vector is a number": (add(vector=3), V, "want a registered name"),
    "vector is a list": (add(vector=[1.0]), V, "want a registered name"),
    "name is empty": (add(vector=""), V, "1 to 200 characters"),
    "name is too long": (add(vector="x" * 201), V, "1 to 200 characters"),
    "no hook": (add(vector={}), V, "at least one of pre_attn"),
    "unknown hook": (add(vector={"post_blok": {}}), f"{V}.post_blok", "did you mean 'post_block'"),
    "hook is no object": (add(vector={"post_block": [1.0]}), f"{V}.post_block", "want a packed array"),
    "hook without layers": (add(vector={"post_block": {}}), f"{V}.post_block", "no layers"),
    "layer key": (add(vector={"post_block": {"x": [1.0]}}), f"{V}.post_block.x", "not a layer"),
    "padded layer key": (add(vector={"post_block": {"01": [1.0]}}), f"{V}.post_block.01", "not a layer"),
    "layer twice": (add(vector={"post_block": {"1": [1.0], 1: [1.0]}}), f"{V}.post_block.1", "twice"),
    "row is a number": (add(vector={"post_block": {"1": 1.0}}), f"{V}.post_block.1", "shape [hidden_size]"),
    "row is empty": (add(vector={"post_block": {"1": []}}), f"{V}.post_block.1", "shape [hidden_size]"),
    "row of strings": (add(vector={"post_block": {"1": [1.0, "2"]}}), f"{V}.post_block.1[1]", "got '2'"),
    "row of booleans": (add(vector={"post_block": {"1": [1.0, True]}}), f"{V}.post_block.1[1]", "got True"),
    "row with null": (add(vector={"post_block": {"1": [None]}}), f"{V}.post_block.1[0]", "got None"),
    "row with NaN": (add(vector={"post_block": {"1": [1.0, math.nan]}}), f"{V}.post_block.1[1]", "finite"),
    "row beyond float32": (add(vector={"post_block": {"1": [1e39]}}), f"{V}.post_block.1[0]", "finite in float32"),
    "row of huge integers": (add(vector={"post_block": {"1": [10**400]}}), f"{V}.post_block.1", "too large"),
    "rows of two widths": (
        add(vector={"post_block": {"1": [1.0], "2": [1.0, 2.0]}}),
        f"{V}.post_block.2",
        "has 2 numbers, but layer 1 has 1",
    ),
    "hooks of two widths": (
        add(vector={"post_block": {"1": [1.0]}, "mlp_in": {"1": [1.0, 2.0]}}),
        f"{V}.mlp_in",
        "has width 2, but post_block has 1",
    ),
    "unknown packed key": (inline(scales=[1.0, 1.0]), f"{V}.post_block.scales", "unknown key"),
    "missing packed key": (inline(shape=None), f"{V}.post_block.shape", "required"),
    "unknown dtype": (inline(dtype="float64"), f"{V}.post_block.dtype", "float16, bfloat16, float32"),
    "shape of one dimension": (inline(shape=[8]), f"{V}.post_block.shape", "[number of layers, hidden size]"),
    "shape with a boolean": (inline(shape=[True, 8]), f"{V}.post_block.shape", "[number of layers, hidden size]"),
    "shape with a zero": (inline(shape=[0, 8]), f"{V}.post_block.shape", "[number of layers, hidden size]"),
    "oversize shape": (inline(shape=[2, 1 << 22]), f"{V}.post_block.shape", "register the vector"),
    "wrong count of layers": (inline(layer_indices=[1]), f"{V}.post_block.layer_indices", "but shape says 2"),
    "layers are no list": (inline(layer_indices=1), f"{V}.post_block.layer_indices", "want a list"),
    "duplicate layer": (inline(layer_indices=[1, 1]), f"{V}.post_block.layer_indices[1]", "twice"),
    "negative layer index": (inline(layer_indices=[1, -2]), f"{V}.post_block.layer_indices[1]", "from 0"),
    "layer as string": (inline(layer_indices=["1", 2]), f"{V}.post_block.layer_indices[0]", "whole number"),
    "layer as boolean": (inline(layer_indices=[2, True]), f"{V}.post_block.layer_indices[1]", "whole number"),
    "too few bytes": (inline(data=f32(1.0)), f"{V}.post_block.data", "of 32 bytes"),
    "too few raw bytes": (inline(data=b"1234"), f"{V}.post_block.data", "has 4 bytes, want 32"),
    "wrong padding": (inline(data=packed()["data"][:-1] + "A"), f"{V}.post_block.data", "has 33 bytes, want 32"),
    "not base64": (inline(data="!" * 44), f"{V}.post_block.data", "is not base64"),
    "not ASCII": (inline(data="é" * 44), f"{V}.post_block.data", "is not base64"),
    "data is a list": (inline(data=[1.0]), f"{V}.post_block.data", "want a base64 string or bytes"),
    "packed NaN": (inline(data=NAN_IN_ROW_1), f"{V}.post_block.data", "number 2 of layer 2 is nan"),
    "gate is no object": (add(gate="g"), "interventions[1].gate", "want an object"),
    "gate without threshold": (add(gate={"probe": "p"}), "interventions[1].gate.threshold", "required"),
    "gate with NaN": (add(gate={"probe": "p", "threshold": math.nan}), "interventions[1].gate.threshold", "finite"),
    "gate without slope": (
        add(gate={"probe": "p", "threshold": 0.0, "sharpness": 0}),
        "interventions[1].gate.sharpness",
        "above 0",
    ),
    "hard gate with slope": (
        add(gate={"probe": "p", "threshold": 0.0, "sharpness": 1.0, "hard": True}),
        "interventions[1].gate.sharpness",
        "no effect",
    ),
    "gate with a number as flag": (
        add(gate={"probe": "p", "threshold": 0.0, "invert": 1}),
        "interventions[1].gate.invert",
        "true or false",
    ),
    "gate with unknown key": (
        add(gate={"probe": "p", "treshold": 0.0}),
        "interventions[1].gate.treshold",
        "did you mean 'threshold'",
    ),
    "probe at two sites": (
        add(gate={"probe": {"post_block": {"1": [1.0], "2": [1.0]}}, "threshold": 0.0}),
        "interventions[1].gate.probe",
        "one site",
    ),
    "probe with a fault inside": (
        add(gate={"probe": {"post_block": {"1": ["a"]}}, "threshold": 0.0}),
        "interventions[1].gate.probe.post_block.1[0]",
        "got 'a'",
    ),
}


@pytest.mark.parametrize("case", REFUSED_IN_FORM)
def test_a_malformed_spec_is_refused_where_the_fault_stands(case: str) -> None:
    spec, field, words = REFUSED_IN_FORM[case]
    with pytest.raises(SteeringError) as refusal:
        Steering.parse(spec)
    assert refusal.value.field == field
    assert words in refusal.value.message


ROW = [1.0] * H
# (spec, model, field path, what the message must say)
REFUSED_BY_MODEL = {
    "unknown name": (add(vector="clam"), MODEL, V, "did you mean 'calm'"),
    "unknown name, nothing close": (add(vector="zzz"), MODEL, V, "registered are calm, deep, mlp, wide"),
    "width of a name": (add(vector="wide"), MODEL, V, "width 6"),
    "inline width": (
        {"interventions": [{"kind": "add", "vector": {"post_block": {"1": [1.0]}}}]},
        MODEL,
        None,
        "width 1",
    ),
    "layer of a name": (add(vector="deep"), MODEL, V, "layer 9 does not exist: the layers are 0 to 3"),
    "hook of a name": (add(vector="mlp"), MODEL, V, "does not serve mlp_in; it serves post_block"),
    "inline layer": (add(vector={"post_block": {"7": ROW}}), MODEL, f"{V}.post_block", "the layers are 0 to 3"),
    "inline hook": (add(vector={"mlp_out": {"1": ROW}}), MODEL, f"{V}.mlp_out", "it serves post_block"),
    "site not served": (
        {"interventions": [{"kind": "add", "vector": {"pre_attn": {"1": ROW}}}]},
        PARTIAL,
        "interventions[0].vector.pre_attn",
        "layer 1 is not served at pre_attn; served are 2",
    ),
    "narrowed to a layer it lacks": (add(layers=[3]), MODEL, "interventions[1].layers", "not among its layers 1, 2"),
    "scaled out of range": (add(scale=20000.0), MODEL, "interventions[1].scale", "65504"),
    "scaled to nothing": (
        add(vector={"post_block": {"1": [1e-10] * H}}, scale=1e-30),
        MODEL,
        "interventions[1].scale",
        "adds",
    ),
    "vector of nearly nothing": (add(vector={"post_block": {"1": [1e-40] * H}}, scale=2.0), MODEL, V, "adds"),
    "vector beyond any scale": (add(vector={"post_block": {"1": [1e30] * H}}, scale=0.5), MODEL, V, "65504"),
    "vector out of range": (add(vector={"post_block": {"1": [7e4] * H}}), MODEL, V, "65504"),
    "sum out of range": (
        {"interventions": [{"kind": "add", "vector": "calm", "scale": 16000.0}] * 2},
        MODEL,
        "interventions",
        "values reach 128000",
    ),
    "gate": (add(gate={"probe": "p", "threshold": 0.0}), MODEL, "interventions[1].gate", "serves no gates"),
}


@pytest.mark.parametrize("case", REFUSED_BY_MODEL)
def test_a_spec_that_does_not_fit_the_model_is_refused_where_the_fault_stands(case: str) -> None:
    spec, model, field, words = REFUSED_BY_MODEL[case]
    steering = Steering.parse(spec)
    with pytest.raises(SteeringError) as refusal:
        steering.resolve(VECTORS, model)
    assert refusal.value.field == (field or "interventions[0].vector")
    assert words in refusal.value.message


def test_vectors_of_two_widths_in_one_spec_are_refused_even_without_a_model() -> None:
    with pytest.raises(SteeringError, match=r"interventions\[1\].vector: has width 6, but interventions\[0\] has 4"):
        Steering.parse(add(vector="wide")).identity("decode", VECTORS)


def test_inline_vectors_are_counted_together() -> None:
    big = SteeringVector.from_block([Site(0, HookPoint.POST_BLOCK)], np.ones((1, 1 << 20), np.float32))
    with pytest.raises(SteeringError, match="interventions: the inline vectors take 20971520 bytes"):
        Steering.parse({"interventions": [{"kind": "add", "vector": big}] * 5})
    Steering.parse({"interventions": [{"kind": "add", "vector": big}] * 4})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ('{"interventions": [{"kind": "add", "vector": "v", "scale": 1, "scale": 2}]}', "'scale' is given twice"),
        ('{"interventions": [{"kind": "add", "vector": "v", "scale": NaN}]}', "finite"),
        ('{"interventions": [{"kind": "add", "vector": "v", "scale": 1e400}]}', "finite"),
        ('"calm"', "want an object"),
    ],
)
def test_a_broken_json_text_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        Steering.parse(text)


def test_the_constructors_refuse_with_the_same_error() -> None:
    with pytest.raises(SteeringError, match="scale: got True, want a number"):
        Add(vector="calm", scale=True)
    with pytest.raises(SteeringError, match="interventions: is empty"):
        Steering(interventions=())


def test_a_refusal_is_a_value_error_of_one_readable_line() -> None:
    with pytest.raises(ValueError) as refusal:
        Steering.parse(json.dumps(add(vector={"post_block": packed(data="A" * 100_000)})))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_refusal_survives_the_way_between_processes() -> None:
    error = SteeringError("interventions[0].scale", "got nan, want a number")
    copy = ForkingPickler.loads(ForkingPickler.dumps(error))
    assert (copy.field, copy.message, str(copy)) == (error.field, error.message, str(error))
