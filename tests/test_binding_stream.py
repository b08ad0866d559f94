"""What is said to be left of a default, against streams that are run in float64 with the formulas of docs/kinds.md."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.serving.binding import least_share
from trimtab.serving.slot_losses import LONGEST
from trimtab.sites import GateLimits, HookPoint, ModelSites, Site, SlotLimits
from trimtab.spec import Steering

WIDTH, LAYERS, PUSHED = 6, 6, 1
SITES = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS))
KINDS = ("ablate", "clamp", "scale", "swap", "rotate", "lowrank", "feature", "replace", "add:norm")
MODEL = ModelSites(WIDTH, LAYERS, SITES, GateLimits(16, SITES), slots=SlotLimits(64, SITES, frozenset(KINDS)))
MOST = 65504.0
MOVES_BACK = {"add", "ablate", "clamp"}

Row = npt.NDArray[np.float64]
Step = dict[str, Any]

PUSH = np.array([2.0, 2.0, 2.0, 2.0, 0.0, 0.0])
UNIT = PUSH / 4.0
ACROSS = np.array([[0.0] * 4 + [1.0, 0.0], [0.0] * 5 + [1.0], [0.5, -0.5, 0.5, -0.5, 0.0, 0.0]])


def resolved(*steps: Step) -> ResolvedSteering:
    return Steering.parse({"interventions": list(steps)}).resolve({}, MODEL)


def at(layer: int, row: Row) -> dict[str, Any]:
    return {"post_block": {str(layer): row.astype(np.float32).tolist()}}


DEFAULT = resolved({"kind": "add", "vector": at(PUSHED, PUSH)})


def row_of(source: dict[str, Any]) -> Row:
    ((rows,),) = (hook.values() for hook in source.values())
    return np.array(rows, np.float32).astype(np.float64)


def unit_of(source: dict[str, Any]) -> Row:
    row = row_of(source)
    return row / np.linalg.norm(row)


def through(stream: Row, steps: list[Step], opened: list[float], pushed: bool = True) -> list[Row]:
    """The stream behind each layer. Layers do nothing but what the steps say, whose gates are open so far."""
    after, acting = [], list(zip(steps, opened, strict=True))
    for layer in range(LAYERS):
        here = [(step, factor) for step, factor in acting if layer_of(step) == layer]
        stream = _behind(stream, here, PUSH if pushed and layer == PUSHED else np.zeros(WIDTH))
        after.append(stream)
    return after


def layer_of(step: Step) -> int:
    source = next(step[name] for name in ("vector", "encoder", "read") if name in step)
    return int(next(iter((source[0] if isinstance(source, list) else source)["post_block"])))


def _behind(x: Row, steps: list[tuple[Step, float]], push: Row) -> Row:
    y = x + push
    for step, factor in steps:
        if step["kind"] == "replace":
            y = y + factor * step["amount"] * (row_of(step["vector"]) - x)
        if step["kind"] == "add":
            row = row_of(step["vector"])
            by_norm = step.get("unit") == "norm"
            y = y + factor * step["scale"] * (np.linalg.norm(x) * unit_of(step["vector"]) if by_norm else row)
    members = [(step, factor) for step, factor in steps if step["kind"] in ("ablate", "clamp", "scale")]
    z = y + sum((factor * _written(y, step) for step, factor in steps), np.zeros(WIDTH))
    if members:
        ways = np.stack([unit_of(step["vector"]) for step, _ in members])
        moved = [factor * _moved(way @ y, step) for way, (step, factor) in zip(ways, members, strict=True)]
        z = z + np.linalg.pinv(ways) @ moved
    return z


def _moved(u: float, step: Step) -> float:
    if step["kind"] == "ablate":
        return -step["strength"] * u
    if step["kind"] == "scale":
        return (step["factor"] - 1.0) * u
    return step["strength"] * (min(max(u, step.get("min", -np.inf)), step.get("max", np.inf)) - u)


def _written(y: Row, step: Step) -> Row:
    if step["kind"] == "swap":
        return (unit_of(step["vector"]) @ y) * (unit_of(step["to"]) - unit_of(step["vector"]))
    if step["kind"] == "lowrank":
        ranks = zip(step["read"], step["bias"], step["write"], strict=True)
        return sum(((row_of(read) @ y + bias) * row_of(write) for read, bias, write in ranks), np.zeros(WIDTH))
    if step["kind"] == "feature":
        u = row_of(step["encoder"]) @ y + step["bias"]
        wanted = step["scale"] * max(u, 0.0) + step["add"]
        return (wanted - max(u, 0.0)) * row_of(step["decoder"])
    if step["kind"] == "rotate":
        a, beside = unit_of(step["vector"]), unit_of(step["plane"])
        b = beside - (beside @ a) * a
        b /= np.linalg.norm(b)
        p, q = a @ y, b @ y
        t = np.radians(step.get("by", step.get("to")))
        turned = p * np.cos(t) - q * np.sin(t), p * np.sin(t) + q * np.cos(t)
        if "to" in step:
            turned = np.hypot(p, q) * np.cos(t), np.hypot(p, q) * np.sin(t)
        return (turned[0] - p) * a + (turned[1] - q) * b if p > 0 or not step["adaptive"] else np.zeros(WIDTH)
    return np.zeros(WIDTH)


def left(stream: Row, steps: list[Step], opened: list[float]) -> float:
    """The least share of the push that the stream has along it behind the push, of what it had before."""
    before = [stream] * LAYERS
    if {step["kind"] for step in steps} <= MOVES_BACK and not any(step.get("unit") for step in steps):
        slots = [(step, factor) for step, factor in zip(steps, opened, strict=True) if step["kind"] != "add"]
        before = through(stream, [step for step, _ in slots], [factor for _, factor in slots], pushed=False)
    pairs = zip(through(stream, steps, opened), before, strict=True)
    return min(float((after - was) @ PUSH) / float(PUSH @ PUSH) for after, was in list(pairs)[PUSHED:])


def said(*steps: Step) -> float:
    share = least_share(DEFAULT, resolved(*steps))
    return 1.0 if share is None else share.left


def tilted(eps: float, layer: int, way: int = 0, length: float = 1.0) -> dict[str, Any]:
    return at(layer, length * (ACROSS[way] + eps * UNIT))


def there_and_back(eps: float) -> dict[str, list[Step]]:
    """Of each kind two at its largest numbers, of which the second takes out what the first has put elsewhere."""
    large = {"scale": MOST}
    back = {"kind": "ablate", "vector": tilted(0.0, 3), "strength": 1.0}
    lowrank: Step = {"kind": "lowrank", "bias": [MOST], "read": [tilted(0.0, 2)]}
    bias: Step = {"kind": "lowrank", "bias": [400.0, 400.0], "read": [tilted(0.0, 2, length=1e-3)] * 2}
    feature: Step = {"kind": "feature", "architecture": "relu", "encoder": tilted(0.0, 2, length=MOST), "bias": MOST}
    return {
        "ablate": [
            {"kind": "add", "vector": tilted(0.0, 2, length=MOST), "scale": 1.0},
            {"kind": "ablate", "vector": tilted(eps, 2), "strength": 2.0},
        ],
        "ablate and back": [
            {"kind": "ablate", "vector": tilted(eps * (layer % 2), layer), "strength": 2.0} for layer in range(2, 6)
        ],
        "clamp": [{"kind": "clamp", "vector": tilted(eps, 2), "min": -MOST, "max": -MOST, "strength": 1.0}, back],
        "scale": [
            {"kind": "scale", "vector": tilted(eps, 2), "factor": 1.0 - MOST},
            {"kind": "scale", "vector": tilted(0.0, 3), "factor": 1.0 / (1.0 - MOST)},
        ],
        "scale in a set": [
            {"kind": "scale", "vector": tilted(eps, 2), "factor": -9.0},
            {"kind": "ablate", "vector": tilted(0.0, 2, 1), "strength": 1.0},
        ],
        "swap": [{"kind": "swap", "vector": tilted(0.0, 2), "to": tilted(eps, 2, 1)}],
        "rotate": [
            {"kind": "rotate", "vector": tilted(0.0, 2), "plane": tilted(eps, 2, 1), "by": 90.0, "adaptive": False}
        ],
        "lowrank": [lowrank | {"write": [tilted(-eps, 2, length=MOST)]}, back],
        "two of a lowrank": [bias | {"write": [tilted(eps, 2, length=-3e4), tilted(0.0, 2, length=3e4)]}],
        "feature": [feature | {"decoder": tilted(eps, 2, length=-MOST), "scale": MOST, "add": MOST}, back],
        "replace": [{"kind": "replace", "vector": tilted(-eps, 0, length=MOST), "amount": 1.0}],
        "add by norms": [{"kind": "add", "unit": "norm", "vector": tilted(-eps, 0)} | large, back],
    }


@pytest.mark.parametrize("kind", list(there_and_back(0.0)))
def test_no_overlap_is_too_small_to_count_at_the_largest_numbers(kind: str) -> None:
    for power in range(-8, -2):
        steps = there_and_back(10.0**power)[kind]
        bound = said(*steps)
        for length, way, sign in itertools.product((0.0, 120.0, LONGEST), range(3), (1.0, -1.0)):
            found = left(length * sign * ACROSS[way], steps, [1.0] * len(steps))
            assert bound <= found + 1e-9 * abs(found) + 1e-9, (power, length, way)


def rounded_across(seed: int, width: int = 512) -> tuple[Row, Row]:
    """A default of length 4, and a direction that was made orthogonal to it in float32."""
    rng = np.random.default_rng(seed)
    push, way = rng.normal(size=(2, width)).astype(np.float32)
    push *= np.float32(4.0) / np.linalg.norm(push)
    way /= np.linalg.norm(way)
    unit = push / np.linalg.norm(push)
    way -= (way @ unit) * unit
    return push.astype(np.float64), way.astype(np.float64)


@pytest.mark.parametrize(
    "step",
    [
        {"kind": "ablate"},
        {"kind": "clamp", "min": -3.0, "max": 60.0},
        {"kind": "scale", "factor": 3.0},
        {"kind": "swap", "to": 1},
        {"kind": "rotate", "plane": 1, "to": 30.0},
    ],
    ids=lambda step: step["kind"],
)
@pytest.mark.parametrize("layers", [1, 4])
def test_directions_that_are_orthogonal_in_float32_take_next_to_nothing(step: Step, layers: int) -> None:
    for seed in range(8):
        push, way = rounded_across(seed)
        unit = push / np.linalg.norm(push)
        _, other = rounded_across(100 + seed)
        other = other.astype(np.float32)
        other -= np.float32(other @ unit) * unit.astype(np.float32)
        model = ModelSites(512, LAYERS, SITES, slots=MODEL.slots)
        sources = {"vector": way} | {name: other for name, value in step.items() if value == 1}
        own = step | {name: at(2, row) for name, row in sources.items()} | {"layers": list(range(2, 2 + layers))}
        spec = Steering.parse({"interventions": [own, {"kind": "add", "vector": at(1, 50.0 * way)}]})
        default = Steering.parse({"interventions": [{"kind": "add", "vector": at(1, push)}]}).resolve({}, model)
        share = least_share(default, spec.resolve({}, model))
        assert share is not None
        assert share.left > 0.98  # a `scale` by 3 in 4 layers makes a stream 81 times as long


def some_step(rng: np.random.Generator, tame: bool) -> Step:
    layer = int(rng.integers(LAYERS))

    def source(length: float = 1.0) -> dict[str, Any]:
        across = rng.normal(size=3) @ ACROSS if rng.random() < 0.5 else ACROSS[rng.integers(3)]
        eps = rng.choice([0.0, 1.0, -1.0]) * 10.0 ** rng.uniform(-8, -1)
        return at(layer, length * (across / np.linalg.norm(across) + eps * UNIT))

    def size(most: float = MOST / 8) -> float:
        return float(rng.choice([1.0, -1.0]) * most ** rng.uniform(0, 1))

    kind = str(rng.choice(["add", "ablate", "clamp"] if tame else ["add", *KINDS]))
    if kind == "clamp":
        low, high = sorted([size(), size()])
        return {"kind": kind, "vector": source(), "min": low, "max": high, "strength": float(rng.uniform(0.1, 1))}
    if kind == "lowrank":
        lengths = [[size(100.0), size(100.0)] for _ in range(2)]
        reads, writes = ([source(row[way]) for row in lengths] for way in (0, 1))
        return {"kind": kind, "read": reads, "write": writes, "bias": [size(), size()]}
    if kind == "feature":
        more = {"bias": size(), "scale": size(100.0), "add": size()}
        rows = {"encoder": source(size(100.0)), "decoder": source(size(100.0))}
        return {"kind": kind, "architecture": "relu", **rows, **more}
    if kind == "rotate":
        angle = {str(rng.choice(["by", "to"])): float(rng.uniform(-180, 180))}
        return {"kind": kind, "vector": source(), "plane": source(), "adaptive": bool(rng.random() < 0.5), **angle}
    own: dict[str, Step] = {
        "add": {"scale": size()},
        "add:norm": {"kind": "add", "scale": size(10.0), "unit": "norm"},
        "ablate": {"strength": float(rng.uniform(0.1, 2.0))},
        "scale": {"factor": size()},
        "replace": {"amount": float(rng.uniform(0.1, 1.0))},
        "swap": {"to": source()},
    }
    return {"kind": kind, "vector": source()} | own[kind]


@pytest.mark.parametrize("tame", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_stream_has_less_than_is_said(seed: int, tame: bool) -> None:
    """Random requests, streams and gates."""
    rng = np.random.default_rng([seed, tame])
    served = 0
    for _ in range(60):
        steps = [some_step(rng, tame) for _ in range(rng.integers(1, 5))]
        gated = [step | {"gate": {"probe": at(0, UNIT), "threshold": float(i)}} for i, step in enumerate(steps)]
        has_gates = rng.random() < 0.5
        try:
            bound = said(*(gated if has_gates else steps))
        except SteeringError:  # what cannot be served together at all
            continue
        served += 1
        for _ in range(20):
            replaced = any(
                step["kind"] == "replace" for step in steps
            )  # what the model itself has is not the default's
            stream = rng.normal(size=3) @ ACROSS if replaced or rng.random() < 0.5 else rng.normal(size=WIDTH)
            stream *= LONGEST * 10.0 ** rng.uniform(-4, 0) / np.linalg.norm(stream)
            opened = [float(rng.choice([0.0, 1.0, rng.random()])) if has_gates else 1.0 for _ in steps]
            found = left(stream, steps, opened)
            assert bound <= found + 1e-6 * (1.0 + abs(found)), (steps, stream)
    assert served > 30
