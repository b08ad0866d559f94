"""A model behind one monitor, against a slow forward pass with its score, factor and sums in float64."""

from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from oracle import Addition, Recorder, recompute

from trimtab import Probe
from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Phase, Site

STEPS = 6
PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11], [12, 13, 14, 15]]
ORDER = [hook.value for hook in HookPoint]


def numbers(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(32, generator=torch.Generator().manual_seed(seed))


class Monitor:
    """One probe for the whole engine, as a caller writes it and as arithmetic."""

    def __init__(self, layer: int, hook: str, *, threshold=0.1, sharpness=1.5, bias=0.0, invert=False) -> None:
        self.at = (layer, ORDER.index(hook))
        self.direction, self.bias = numbers(70, 0.4), bias
        self.threshold, self.sharpness, self.invert = threshold, sharpness, invert
        probe = {hook: {str(layer): self.direction.tolist()}, "bias": bias}
        self.setting = {"probe": probe, "threshold": threshold, "sharpness": sharpness, "invert": invert}

    def factor(self, x: torch.Tensor) -> float:
        score = float(x.double() @ self.direction.double()) + self.bias
        y = float(torch.sigmoid(torch.tensor(self.sharpness * (score - self.threshold), dtype=torch.float64)))
        return 1.0 - y if self.invert else y


def slow(family: Family, additions: list[list[Addition]], monitor: Monitor, prompts=PROMPTS, ungated=()):
    """Greedy tokens, logits of each step, and the factors: the whole batch is computed anew each step.

    Of `ungated` rows the factor is 1: what stands behind a gate of its own is no matter of the monitor.
    """
    model = family.model()
    width = max(map(len, prompts))
    factors: dict[tuple[int, int], float] = {}

    def steer(layer: int, hook: str, value: torch.Tensor) -> torch.Tensor:
        here, before, value = (layer, ORDER.index(hook)), value, value.clone()
        for row, prompt in enumerate(prompts):
            for column in range(width - len(prompt), value.shape[1]):
                decode = column >= width
                if here == monitor.at:
                    factors[row, column] = monitor.factor(before[row, column])
                y = factors[row, column] if decode and here >= monitor.at and row not in ungated else 1.0
                total = torch.zeros(value.shape[2], dtype=torch.float64)
                for one in additions[row]:
                    if one.hook == hook and layer in one.layers and one.phase in ("all", ("prefill", "decode")[decode]):
                        total += y * one.scale * one.vector.double()
                value[row, column] = (value[row, column].double() + total).to(value.dtype)
        return value

    family.edited(model, steer)
    tokens, logits = recompute(model, prompts, STEPS)
    decoded = {place: y for place, y in factors.items() if place[1] >= width}
    return tokens, logits, decoded


def specs(additions: list[list[Addition]]) -> list[dict[str, Any] | None]:
    return [{"interventions": [one.spec() for one in row]} if row else None for row in additions]


def assert_same(model: SteeredModel, given: list[Any], expected, prompts=PROMPTS, **options: Any):
    tokens, logits, _ = expected
    recorder = Recorder()
    out = model.generate(
        prompts, given, max_new_tokens=STEPS, do_sample=False, logits_processor=[recorder], **options
    )  # fmt: skip
    for ours, theirs in zip(recorder.logits, logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert [generation.token_ids for generation in out] == tokens
    return out


MIXED = [
    [Addition("post_block", (0, 1, 2), numbers(1), 1.5), Addition("post_block", (1,), numbers(2), phase="decode")],
    [],
    [Addition("pre_attn", (0, 2), numbers(3), 2.0), Addition("mlp_in", (1,), numbers(4), -1.0)],
    [Addition("post_block", (2,), numbers(5), 2.0, "prefill")],
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_behind_a_monitor_computes_what_the_slow_model_computes(name: str) -> None:
    family, monitor = FAMILIES[name], Monitor(1, "pre_attn", bias=0.2)
    expected = slow(family, MIXED, monitor)
    assert any(0.1 < y < 0.9 for y in expected[2].values())
    with SteeredModel(family.model(), monitor=monitor.setting) as model:
        out = assert_same(model, specs(MIXED), expected)
        assert_same(model, specs(MIXED), expected, use_cache=False)
    assert [bool(generation.receipt.monitor) for generation in out] == [True, False, True, False]


@pytest.mark.parametrize("hook", ["pre_attn", "post_attn", "mlp_in", "mlp_out", "post_block"])
@pytest.mark.parametrize("invert", [False, True])
def test_a_monitor_reads_before_steering_at_its_site_and_leaves_earlier_sites_alone(hook: str, invert: bool) -> None:
    monitor = Monitor(1, hook, invert=invert)
    row = [
        Addition(hook, (0, 1, 2), numbers(6), 1.5),
        Addition(hook, (1,), 8.0 * monitor.direction),  # would decide everything if it were seen
    ]
    expected = slow(FAMILIES["llama"], [row], monitor, PROMPTS[:1])
    with SteeredModel(FAMILIES["llama"].model(), monitor=monitor.setting) as model:
        assert_same(model, specs([row]), expected, PROMPTS[:1])


def test_what_stands_behind_a_gate_of_its_own_is_no_matter_of_the_monitor() -> None:
    monitor = Monitor(0, "post_block")
    additions = [[Addition("post_block", (1, 2), numbers(7), 1.5)]] * 2
    expected = slow(FAMILIES["llama"], additions, monitor, PROMPTS[:2], ungated=[1])
    given = specs(additions)
    given[1]["interventions"][0]["gate"] = {"probe": {"post_block": {"0": [0.0] * 32}}, "threshold": -1e6}
    with SteeredModel(FAMILIES["llama"].model(), monitor=monitor.setting) as model:
        out = assert_same(model, given, expected, PROMPTS[:2])
    assert [bool(generation.receipt.monitor) for generation in out] == [True, False]


def test_an_open_monitor_equals_none_and_a_shut_one_no_steering_of_new_tokens_to_the_bit() -> None:
    nothing = {"post_block": {"0": [0.0] * 32}}
    step = Addition("post_block", (0, 2), numbers(1), 1.7).spec()
    seen = {}
    cases = {"open": (-1e6, "all"), "shut": (1e6, "all"), "all": (None, "all"), "prompt": (None, "prefill")}
    for name, (threshold, phase) in cases.items():
        monitor = None if threshold is None else {"probe": nothing, "threshold": threshold}
        seen[name] = Recorder()
        with SteeredModel(FAMILIES["llama"].model(), monitor=monitor) as model:
            spec = {"interventions": [{**step, "phase": phase}]}
            model.generate(PROMPTS, spec, max_new_tokens=STEPS, logits_processor=[seen[name]])
    for one, other in (("open", "all"), ("shut", "prompt")):
        assert all(torch.equal(a, b) for a, b in zip(seen[one].logits, seen[other].logits, strict=True))


def test_a_monitor_may_name_a_probe_and_is_in_the_identity_of_new_tokens() -> None:
    storm = Probe.at(Site(0, HookPoint.POST_BLOCK), numbers(50, 0.5))
    spec = {"interventions": [Addition("post_block", (1,), numbers(1)).spec()]}
    identities = []
    for threshold in (0.0, 1.0, None):
        monitor = None if threshold is None else {"probe": "storm", "threshold": threshold}
        with SteeredModel(FAMILIES["llama"].model(), probes={"storm": storm}, monitor=monitor) as model:
            model.register("storm", Probe.at(Site(1, HookPoint.POST_BLOCK), numbers(51)))  # changes no monitor
            (out,) = model.generate(PROMPTS[:1], spec, max_new_tokens=1)
            identities.append(dict(out.receipt.identity))
    assert len({identity[Phase.PREFILL] for identity in identities}) == 1
    assert len({identity[Phase.DECODE] for identity in identities}) == 3


@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        ("storm", "monitor: is a str; want"),
        ({"probe": "storm", "threshold": 0.0}, r"monitor\.probe: there is no probe 'storm'"),
        ({"probe": {"post_block": {"0": [0.0] * 32}}}, r"monitor\.threshold"),
        (
            {"probe": {"post_block": {"0": [0.0] * 32}}, "threshold": 0.0, "hard": True},
            r"monitor\.hard: .* `sharpness`",
        ),
        ({"probe": {"post_block": {"9": [0.0] * 32}}, "threshold": 0.0}, r"monitor\.probe: .* layer 9 does not exist"),
        ({"probe": {"post_block": {"0": [0.0] * 3}}, "threshold": 0.0}, r"monitor\.probe: has width 3"),
    ],
)
def test_what_cannot_be_a_monitor_is_refused_by_name(monitor: Any, words: str) -> None:
    with pytest.raises(SteeringError, match=words):
        SteeredModel(FAMILIES["llama"].model(), monitor=monitor)
