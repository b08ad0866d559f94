"""The identity of a spec: blind to how it is written, changed by everything that changes a token's KV."""

import base64
import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.sites import HookPoint, Phase, Site
from trimtab.spec import Steering
from trimtab.vectors import SteeringVector

H = 3
# Multiples of 1/8 up to 4: exact in float16, bfloat16 and float32, and in any sum of a few of them.
numbers = st.integers(-32, 32).map(lambda n: n / 8)
rows = st.lists(numbers, min_size=H, max_size=H).filter(any)
layer_rows = st.dictionaries(st.integers(0, 5), rows, min_size=1, max_size=3)
contents = st.dictionaries(st.sampled_from(list(HookPoint)), layer_rows, min_size=1, max_size=2)
scales = st.integers(-16, 16).filter(bool).map(lambda n: n / 4)
phases = st.sampled_from(["all", "prefill", "decode"])
steps = st.fixed_dictionaries({"vector": contents, "scale": scales, "phase": phases})
specs = st.lists(steps, min_size=1, max_size=4)


def spec(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"interventions": [{"kind": "add"} | step for step in steps]}


def identities(interventions: Any, vectors: dict[str, SteeringVector] | None = None) -> tuple[str, str]:
    steering = Steering.parse(interventions)
    return steering.identity(Phase.PREFILL, vectors), steering.identity(Phase.DECODE, vectors)


def shuffled(mapping: dict[Any, Any], draw: st.DataObject) -> dict[Any, Any]:
    return {key: mapping[key] for key in draw.draw(st.permutations(list(mapping)))}


def rewritten(content: dict[HookPoint, dict[int, list[float]]], draw: st.DataObject) -> Any:
    """The same content in another order and container."""
    form = draw.draw(st.sampled_from(["float16", "float32", "bfloat16", "lists", "arrays", "object", "raw"]))
    content = {hook: shuffled(layers, draw) for hook, layers in shuffled(content, draw).items()}
    if form == "object":
        return SteeringVector({Site(layer, hook): row for hook, by in content.items() for layer, row in by.items()})
    if form == "lists":
        return {hook.value: {str(layer): row for layer, row in by.items()} for hook, by in content.items()}
    if form == "arrays":
        return {hook: {layer: np.array(row, np.float64) for layer, row in by.items()} for hook, by in content.items()}
    body = {}
    for hook, by in content.items():
        block = np.array(list(by.values()), np.float32)
        dtype = "float32" if form == "raw" else form
        raw = {
            "float16": block.astype("<f2").tobytes(),
            "float32": block.astype("<f4").tobytes(),
            "bfloat16": (block.view(np.uint32) >> 16).astype("<u2").tobytes(),
        }[dtype]
        data = raw if form == "raw" else base64.b64encode(raw).decode()
        body[hook.value] = {"data": data, "layer_indices": list(by), "shape": list(block.shape), "dtype": dtype}
    return body


def effect(steps: list[dict[str, Any]], phase: str) -> dict[tuple[str, int], list[float]]:
    """What a spec adds at each site, in exact fractions: the meaning that an identity stands for."""
    total: dict[tuple[str, int], list[float]] = {}
    for step in steps:
        if step["phase"] not in ("all", phase):
            continue
        for hook, by in step["vector"].items():
            for layer, row in by.items():
                old = total.get((hook.value, layer), [0.0] * H)
                total[hook.value, layer] = [a + step["scale"] * b for a, b in zip(old, row, strict=True)]
    return {site: row for site, row in total.items() if any(row)}


@given(specs, st.data())
@settings(max_examples=150, deadline=None)
def test_an_identity_ignores_order_container_and_packing(steps: list[dict[str, Any]], data: st.DataObject) -> None:
    other = [step | {"vector": rewritten(step["vector"], data)} for step in data.draw(st.permutations(steps))]
    assert identities(spec(other)) == identities(spec(steps))


@given(specs)
@settings(max_examples=50, deadline=None)
def test_an_identity_is_the_same_for_names_json_and_two_halves(steps: list[dict[str, Any]]) -> None:
    names = {f"v{i}": as_vector(step["vector"]) for i, step in enumerate(steps)}
    named = [step | {"vector": f"v{i}"} for i, step in enumerate(steps)]
    halves = [step | {"scale": step["scale"] / 2} for step in named for _ in range(2)]
    expected = identities(spec(steps))
    assert identities(json.dumps(spec(named)), names) == expected
    assert identities(spec(halves), names) == expected


@given(specs, specs)
@settings(max_examples=120, deadline=None)
def test_specs_of_different_effect_have_different_identities(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for phase in ("prefill", "decode"):
        first, second = (Steering.parse(spec(steps)).identity(phase) for steps in (a, b))
        if effect(a, phase) != effect(b, phase):
            assert first != second


@given(steps, st.data())
@settings(max_examples=150, deadline=None)
def test_an_identity_changes_with_every_single_part(step: dict[str, Any], data: st.DataObject) -> None:
    hook = data.draw(st.sampled_from(sorted(step["vector"])))
    layer = data.draw(st.sampled_from(sorted(step["vector"][hook])))
    content = {h: {k: list(row) for k, row in by.items()} for h, by in step["vector"].items()}
    part = data.draw(st.sampled_from(["value", "layer", "hook", "scale", "phase"]))
    changed = dict(step)
    if part == "value":
        content[hook][layer][data.draw(st.integers(0, H - 1))] += 8.0
    elif part == "layer":
        content[hook][9] = content[hook].pop(layer)
    elif part == "hook":
        moved = next(h for h in HookPoint if h not in content)
        content[moved] = content.pop(hook)
    elif part == "scale":
        changed["scale"] = step["scale"] + 100.0
    else:
        changed["phase"] = data.draw(phases.filter(lambda phase: phase != step["phase"]))
    assert identities(spec([changed | {"vector": content}])) != identities(spec([step]))


def as_vector(content: dict[HookPoint, dict[int, list[float]]]) -> SteeringVector:
    return SteeringVector({Site(layer, hook): row for hook, by in content.items() for layer, row in by.items()})


def test_the_phases_of_one_spec_share_an_identity_where_they_add_the_same() -> None:
    steps = [{"vector": {"post_block": {"1": [1.0] * H}}, "phase": phase} for phase in ("prefill", "decode")]
    prefill, decode = identities(spec(steps))
    assert prefill == decode != ""


CALM = SteeringVector({Site(14, HookPoint.POST_BLOCK): [0.5, -1.0, 2.0], Site(3, HookPoint.MLP_IN): [1.0, 0.0, 0.0]})
BOLD = SteeringVector({Site(14, HookPoint.POST_BLOCK): [1.0, 1.0, 1.0]})
GOLDEN = {
    "one": ([{"vector": "calm", "scale": 1.5}], "9bd43d4e054629f4cacea412772b71b8c82ae2591898c9637817ed6903ff1eec"),
    "one, narrowed": (
        [{"vector": "calm", "scale": 1.5, "layers": [14]}],
        "aa1b94ec3a44922980851c28526f43f2685641790f952eafdf5ae760f6620e89",
    ),
    "sum": (
        [{"vector": "calm", "scale": 1.5}, {"vector": "bold", "scale": -0.1}],
        "ca2371fd12f57e7a80b0ee1c1c69539db4b82949ae74c9744d856299e670e19b",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_identities_do_not_drift(case: str) -> None:
    """Caches and workers of another build compare these: a change is a new version, never an accident."""
    steps, expected = GOLDEN[case]
    assert Steering.parse(spec(steps)).identity("decode", {"calm": CALM, "bold": BOLD}) == expected


def test_vector_digests_do_not_drift() -> None:
    assert CALM.digest.hex() == "4da21778c12d9be31b2582c953947fe4fe4d541baf89e07dc3b273fa7be2361b"
    known = ("pre_attn", "post_attn", "mlp_in", "mlp_out", "post_block")  # those that there were when this was taken
    whole = SteeringVector({Site(1, HookPoint(hook)): [float(i), -1.0, 0.5] for i, hook in enumerate(known)})
    assert whole.digest.hex() == "58423f57cb7066eacbb8597c968338e1cf1fffb7226e829819f17c40d919468f"


def test_digests_are_what_the_format_page_says() -> None:
    """docs/formats.md in ten lines of hashlib, so that another program can compute them too."""

    def sha(content: bytes) -> bytes:
        return hashlib.sha256(content).digest()

    def site(layer: int, hook: str, *numbers: float) -> bytes:
        return f"{layer} {hook} {len(numbers)}\0".encode() + sha(struct.pack(f"<{len(numbers)}f", *numbers))

    calm = sha(b"trimtab vector 1\0" + site(3, "mlp_in", 1, 0, 0) + site(14, "post_block", 0.5, -1, 2))
    bold = sha(b"trimtab vector 1\0" + site(14, "post_block", 1, 1, 1))
    assert (CALM.digest, BOLD.digest) == (calm, bold)
    unit = 2.0**-14  # calm's largest number, 2, is 32768 of them
    one = sha(b"trimtab program 2\0" + calm + struct.pack("<f", 1.5 * unit))
    assert one.hex() == GOLDEN["one"][1]
    terms = sorted([calm + struct.pack("<d", 1.5), bold + struct.pack("<d", -0.1)])
    both = sha(b"trimtab program 2\0" + sha(b"trimtab row 1\0" + b"".join(terms)) + struct.pack("<f", 1.0))
    assert both.hex() == GOLDEN["sum"][1]
