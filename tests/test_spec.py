"""All forms of one request mean the same, and resolve to the programs that they describe."""

import base64
import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pytest

import trimtab.spec.request
from trimtab.errors import SteeringError
from trimtab.program import Term
from trimtab.program.codec import decode, encode
from trimtab.sites import HookPoint, ModelSites, Phase, Site
from trimtab.spec import Add, Gate, Intervention, Steering
from trimtab.spec.fields import Number
from trimtab.vectors import Probe, SteeringVector

H = 8
MODEL = ModelSites(H, 4, frozenset(Site(layer, hook) for layer in range(4) for hook in HookPoint))
# Numbers that float16 and bfloat16 both hold exactly, so that every packing has the same content.
NUMBERS = np.arange(-8, 8, dtype=np.float32).reshape(2, H) / 4
VECTOR = SteeringVector({Site(1, HookPoint.POST_BLOCK): NUMBERS[0], Site(2, HookPoint.POST_BLOCK): NUMBERS[1]})
OTHER = SteeringVector({Site(0, HookPoint.MLP_IN): np.ones(H)})
NAMES = {"calm": VECTOR, "other": OTHER}


def packed(raw: bytes, dtype: str, *, encode: bool = True) -> dict[str, Any]:
    data = base64.b64encode(raw).decode() if encode else raw
    return {"post_block": {"dtype": dtype, "shape": [2, H], "layer_indices": [1, 2], "data": data}}


BFLOAT16 = (NUMBERS.view(np.uint32) >> 16).astype("<u2").tobytes()
FORMS = {
    "name": "calm",
    "object": VECTOR,
    "float32": packed(NUMBERS.astype("<f4").tobytes(), "float32"),
    "float16": packed(NUMBERS.astype("<f2").tobytes(), "float16"),
    "bfloat16": packed(BFLOAT16, "bfloat16"),
    "raw bytes": packed(NUMBERS.astype("<f2").tobytes(), "float16", encode=False),
    "lists": {"post_block": {"1": NUMBERS[0].tolist(), "2": NUMBERS[1].tolist()}},
    "whole numbers as keys": {"post_block": {2: NUMBERS[1].tolist(), 1: NUMBERS[0].tolist()}},
    "arrays": {"post_block": {1: NUMBERS[0], 2: NUMBERS[1].astype(np.float64)}},
    "other order": {
        "post_block": {
            "data": base64.b64encode(NUMBERS[::-1].astype("<f4").tobytes()).decode(),
            "layer_indices": [2, 1],
            "shape": (2, H),
            "dtype": "float32",
        }
    },
    "read-only mapping": MappingProxyType({"post_block": MappingProxyType({"1": NUMBERS[0], "2": NUMBERS[1]})}),
}


def spec(vector: Any, **keys: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": vector} | keys]}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_vector_carries_the_same_numbers(form: str) -> None:
    program = Steering.parse(spec(FORMS[form], scale=1.5)).resolve(NAMES, MODEL).decode
    assert program.row_key == VECTOR.digest
    assert program.factor == 1.5
    np.testing.assert_array_equal(program.row(list(VECTOR.sites)) * program.unit, NUMBERS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_half_precision_reads_every_finite_value_exactly(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    if dtype == "float16":
        expected = bits.view("<f2").astype(np.float64)
    else:  # sign, 8 bits of exponent, 7 of mantissa, by the book
        sign = np.where(bits >> 15, -1.0, 1.0)
        exponent, mantissa = ((bits >> 7) & 0xFF).astype(np.int64), (bits & 0x7F).astype(np.float64)
        with np.errstate(over="ignore"):
            normal = np.ldexp(1 + mantissa / 128, exponent - 127)
        expected = sign * np.where(exponent == 0, np.ldexp(mantissa / 128, -126), normal)
        expected[exponent == 255] = np.nan
    keep = np.isfinite(expected)
    body = {"dtype": dtype, "shape": [1, int(keep.sum())], "layer_indices": [0], "data": bits[keep].tobytes()}
    vector = Steering.parse(spec({"post_block": body})).interventions[0].vector
    assert isinstance(vector, SteeringVector)
    np.testing.assert_array_equal(vector.block[0].astype(np.float64), expected[keep])


@pytest.mark.parametrize("door", [lambda s: s, json.dumps, lambda s: json.dumps(s).encode(), Steering.parse])
def test_every_door_takes_the_same_spec(door: Any) -> None:
    given = spec(FORMS["float16"], scale=2, phase="decode")
    assert Steering.parse(door(given)).resolve({}, MODEL).identity(Phase.DECODE) == Steering(
        interventions=(Add(vector=VECTOR, scale=2.0, phase="decode"),)
    ).identity("decode")


def test_a_phase_limits_what_is_added_to_it() -> None:
    both = {
        "interventions": [
            {"kind": "add", "vector": "calm", "phase": "prefill", "scale": 3},
            {"kind": "add", "vector": "other", "phase": "decode"},
        ]
    }
    resolved = Steering.parse(both).resolve(NAMES, MODEL)
    assert (resolved.prefill.row_key, resolved.prefill.factor) == (VECTOR.digest, 3.0)
    assert (resolved.decode.row_key, resolved.decode.factor) == (OTHER.digest, 1.0)
    assert resolved.sites == (Site(0, HookPoint.MLP_IN), *VECTOR.sites)
    only_decode = Steering.parse(spec("calm", phase="decode")).resolve(NAMES, MODEL)
    assert only_decode.identity(Phase.PREFILL) == ""
    assert only_decode.prefill.row_key == b""


def test_layers_narrow_a_vector() -> None:
    program = Steering.parse(spec("calm", layers=[2])).resolve(NAMES, MODEL).decode
    assert program.sites == (Site(2, HookPoint.POST_BLOCK),)
    np.testing.assert_array_equal(program.row([Site(1, HookPoint.POST_BLOCK), Site(2, HookPoint.POST_BLOCK)])[0], 0)
    assert program.identity == Steering.parse(spec({"post_block": {"2": NUMBERS[1]}})).identity("decode")


def test_a_scale_of_zero_steers_nothing() -> None:
    resolved = Steering.parse(spec("calm", scale=0)).resolve(NAMES, MODEL)
    assert (resolved.identity(Phase.PREFILL), resolved.identity(Phase.DECODE), resolved.sites) == ("", "", ())


def test_numbers_of_numpy_are_numbers() -> None:
    steering = Steering.parse(spec("calm", scale=np.float32(1.5), layers=[np.int64(1)]))
    assert steering.interventions[0] == Add(vector="calm", scale=1.5, layers=(1,))


def test_a_gate_is_read_with_its_defaults() -> None:
    gate = Steering.parse(spec("calm", gate={"probe": "jailbreak", "threshold": 3})).interventions[0].gate
    assert gate == Gate(probe="jailbreak", threshold=3.0, sharpness=1.0, invert=False, hard=False)
    inline = Steering.parse(spec("calm", gate={"probe": {"post_block": {"1": [1.0] * H}}, "threshold": 3}))
    assert inline.interventions[0].gate is not None
    assert inline.interventions[0].gate.probe == Probe.at(Site(1, HookPoint.POST_BLOCK), [1.0] * H)


@pytest.mark.parametrize("form", ["name", "float16"])
def test_a_spec_dumps_to_json_that_reads_back_to_it(form: str) -> None:
    steering = Steering.parse(spec(FORMS[form], scale=-2.5, layers=[1], phase="decode"))
    assert Steering.parse(steering.model_dump_json()) == steering
    assert Steering.parse(steering.model_dump()) == steering


def test_the_json_schema_names_kinds_and_keys() -> None:
    text = json.dumps(Steering.model_json_schema())
    assert all(f'"{word}"' in text for word in ("interventions", "add", "vector", "scale", "phase", "layers", "gate"))


def test_a_spec_can_be_copied_and_its_vectors_are_shared() -> None:
    steering = Steering.parse(spec(VECTOR))
    assert copy.deepcopy(steering).interventions[0].vector is VECTOR


def test_the_request_format_does_not_load_torch() -> None:
    code = "import sys, trimtab.spec, trimtab.program.codec, trimtab.vectors.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_reading_half_precision_starts_no_threads_after_which_a_process_must_not_fork() -> None:
    code = """
import os, numpy, torch
from trimtab.vectors.inline import parse_inline
rows = numpy.ones((64, 8192), numpy.float16)
body = {"dtype": "float16", "shape": list(rows.shape), "layer_indices": list(range(64)), "data": rows.tobytes()}
torch.ones(1) + 1
before = len(os.listdir("/proc/self/task"))
parse_inline({"post_block": body})
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


def test_a_new_kind_is_one_class_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind gives each site's direction one length, which no scale of the vector does."""

    class Length(Intervention):
        kind: Literal["length"] = "length"
        length: Number

        def lower(self, vectors: Mapping[str, SteeringVector], path: str) -> tuple[Term]:
            vector, _ = self.acting(vectors, path)
            return (Term(vector.normalized() * self.length, 1.0),)

    monkeypatch.setattr(trimtab.spec.request, "KINDS", (Add, Length))

    class Wider(Steering):  # reads the kinds anew, as the module does when it is imported
        pass

    lengths = np.linalg.norm(NUMBERS.astype(float), axis=1)
    assert lengths[0] != lengths[1]
    spec = {"interventions": [{"kind": "length", "vector": "calm", "length": 5, "phase": "decode"}]}
    program = Wider.parse(spec).resolve(NAMES, MODEL).decode
    row = program.row(list(VECTOR.sites)) * program.coefficient
    np.testing.assert_allclose(row, NUMBERS * (5 / lengths)[:, None], rtol=1e-6)
    back = decode(encode(Wider.parse(spec).resolve(NAMES, MODEL)), {})
    assert (
        back.decode.identity
        == program.identity
        != Steering.parse({"interventions": [{"kind": "add", "vector": "calm", "scale": 5}]}).identity("decode", NAMES)
    )
    both = {"interventions": [*spec["interventions"], {"kind": "add", "vector": "calm"}]}
    assert len(Wider.parse(both).resolve(NAMES, MODEL).decode.terms) == 2
    with pytest.raises(
        SteeringError, match=r"interventions\[0\]\.kind: unknown kind 'lenth' \(did you mean 'length'\?\)"
    ):
        Wider.parse({"interventions": [{"kind": "lenth", "vector": "calm"}]})
    with pytest.raises(SteeringError, match=r"interventions\[0\]\.scale: unknown key"):
        Wider.parse({"interventions": [{"kind": "length", "vector": "calm", "length": 1, "scale": 1.0}]})
    with pytest.raises(SteeringError, match=r"interventions\[0\]\.kind"):
        Steering.parse(spec)
