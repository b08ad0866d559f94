"""Gated steering against a slow forward pass with probe, gate and sum in float64 in the family's own layers."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from families import FAMILIES, SEQUENTIAL
from oracle import Recorder, recompute

from trimtab import Probe, SteeringVector
from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site

STEPS = 5
PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11], [12, 13, 14, 15]]


def numbers(seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(32, generator=torch.Generator().manual_seed(seed))


@dataclass
class Gated:
    """A vector at some layers of a hook point, let through by a probe; `probe=None` is no gate."""

    layers: tuple[int, ...]
    vector: torch.Tensor
    scale: float = 1.0
    phase: str = "all"
    hook: str = "post_block"
    probe: tuple[int, str, torch.Tensor, float] | None = None  # layer, hook, direction, bias
    threshold: float = 0.0
    sharpness: float | None = 1.0  # None: hard
    invert: bool = False

    def spec(self) -> dict[str, Any]:
        plain = {self.hook: {str(layer): self.vector.tolist() for layer in self.layers}}
        step: dict[str, Any] = {"kind": "add", "vector": plain, "scale": self.scale, "phase": self.phase}
        if self.probe is not None:
            layer, hook, direction, bias = self.probe
            probe = {hook: {str(layer): direction.tolist()}, "bias": bias}
            step["gate"] = {"probe": probe, "threshold": self.threshold, "invert": self.invert}
            step["gate"] |= {"hard": True} if self.sharpness is None else {"sharpness": self.sharpness}
        return step

    def factor(self, x: torch.Tensor) -> float:
        _, _, direction, bias = self.probe
        score = float(x.double() @ direction.double()) + bias
        if self.sharpness is None:
            y = float(score > self.threshold)
        else:
            y = float(torch.sigmoid(torch.tensor(self.sharpness * (score - self.threshold), dtype=torch.float64)))
        return 1.0 - y if self.invert else y


@dataclass
class Joint(Gated):
    """A vector let through by several gates; of `gates`, only what is said of probes counts."""

    join: str = "all"
    gates: tuple[Gated, ...] = ()

    def spec(self) -> dict[str, Any]:
        return super().spec() | {"gate": {self.join: [one.spec()["gate"] for one in self.gates]}}

    def joined(self, factors: list[float]) -> float:
        return math.prod(factors) if self.join == "all" else 1.0 - math.prod(1.0 - factor for factor in factors)


@dataclass
class Slow:
    """Greedy decoding that recomputes the whole batch each step."""

    tokens: list[list[int]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    factors: dict[tuple[int, int, int], float] = field(default_factory=dict)  # row, column, intervention
    owns: dict[tuple[int, int, int, int], float] = field(default_factory=dict)  # and member, of joint gates

    def run(self, family, prompts, interventions: list[list[Gated]], steps: int = STEPS) -> "Slow":
        model = family.model()
        width = max(map(len, prompts))

        def steer(layer: int, hook: str, value: torch.Tensor) -> torch.Tensor:
            before, value = value, value.clone()
            for row, prompt in enumerate(prompts):
                for column in range(width - len(prompt), value.shape[1]):
                    phase = "prefill" if column < width else "decode"
                    added = torch.zeros(value.shape[2], dtype=torch.float64)
                    for number, one in enumerate(interventions[row]):
                        if one.phase not in ("all", phase):
                            continue
                        if one.probe is not None and one.probe[:2] == (layer, hook):
                            self.factors[row, column, number] = one.factor(before[row, column])
                        for member, gate in enumerate(one.gates if isinstance(one, Joint) else ()):
                            if gate.probe[:2] == (layer, hook):
                                self.owns[row, column, number, member] = gate.factor(before[row, column])
                        if one.hook == hook and layer in one.layers:
                            if isinstance(one, Joint):
                                owns = [self.owns[row, column, number, k] for k in range(len(one.gates))]
                                self.factors[row, column, number] = one.joined(owns)
                            factor = self.factors.get((row, column, number), 1.0)
                            added += factor * one.scale * one.vector.double()
                    value[row, column] = (value[row, column].double() + added).to(value.dtype)
            return value

        family.edited(model, steer)
        self.tokens, self.logits = recompute(model, prompts, steps)
        return self


def specs(interventions: list[list[Gated]]) -> list[dict[str, Any] | None]:
    return [{"interventions": [one.spec() for one in row]} if row else None for row in interventions]


def assert_same(model: SteeredModel, interventions: list[list[Gated]], slow: Slow, prompts=PROMPTS, **options: Any):
    recorder = Recorder()
    out = model.generate(
        prompts, specs(interventions), max_new_tokens=STEPS, do_sample=False, logits_processor=[recorder], **options
    )
    for ours, theirs in zip(recorder.logits, slow.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert [generation.token_ids for generation in out] == slow.tokens
    return out


PROBE = (0, "post_block", numbers(50, 0.5), 0.25)
OTHER = (1, "pre_attn", numbers(51, 0.5), 0.0)
EARLY = (0, "pre_attn", numbers(52, 0.5), -0.1)
MIXED = [
    [
        Gated((1, 2), numbers(1), 1.5, probe=PROBE, sharpness=2.0),
        Gated((0, 1), numbers(2), -0.5),
        Gated((1,), numbers(3), phase="decode", probe=OTHER, threshold=0.2, sharpness=None),
    ],
    [],
    [Gated((0,), numbers(4), probe=PROBE, threshold=0.1, invert=True), Gated((2,), numbers(4), 2.0, "prefill")],
    [
        Gated((1, 2), numbers(5), 1.0, probe=EARLY, sharpness=0.5),
        Gated((1,), numbers(6), 1.0, hook="mlp_in", probe=PROBE, threshold=-0.3, sharpness=None, invert=True),
        Gated((2,), numbers(6), 0.7, probe=PROBE),
    ],
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_of_gates_computes_what_the_slow_model_computes(name):
    family = FAMILIES[name]
    mixed = [[one for one in row if one.hook in family.hooks] for row in MIXED]
    slow = Slow().run(family, PROMPTS, mixed)
    with SteeredModel(family.model()) as model:
        out = assert_same(model, mixed, slow)
    assert out[1].receipt.gates == ()
    assert any(0.2 < factor < 0.8 for factor in slow.factors.values())


@pytest.mark.parametrize("hook", SEQUENTIAL)
def test_a_probe_reads_every_hook_point_before_steering_there(hook):
    family = FAMILIES["llama"]
    probe = (1, hook, numbers(60, 0.5), 0.0)
    row = [
        Gated((1, 2), numbers(7), 2.0, probe=probe),
        Gated((1,), numbers(60, 8.0), hook=hook),  # would decide the gate if it were seen
        Gated((1,), numbers(8), hook=hook, probe=probe, invert=True),
    ]
    slow = Slow().run(family, PROMPTS[:1], [row])
    with SteeredModel(family.model()) as model:
        assert_same(model, [row], slow, PROMPTS[:1])


def test_the_receipt_tells_what_each_gate_did():
    family = FAMILIES["llama"]
    slow = Slow().run(family, PROMPTS, MIXED)
    with SteeredModel(family.model()) as model:
        out = assert_same(model, MIXED, slow)
        without_cache = assert_same(model, MIXED, slow, use_cache=False)
    width = max(map(len, PROMPTS))
    for row, interventions in enumerate(MIXED):
        expected = []
        for number, one in enumerate(interventions):
            if one.probe is not None:
                columns = range(width - len(PROMPTS[row]), width + STEPS - 1)
                factors = [slow.factors[row, c, number] for c in columns if (row, c, number) in slow.factors]
                expected.append((len(factors), sum(factors) / len(factors), sum(f > 0.5 for f in factors)))
        got = [(use.tokens, use.mean, use.above_half) for use in out[row].receipt.gates]
        assert [(t, pytest.approx(m, abs=1e-5), a) for t, m, a in sorted(expected)] == sorted(got)
        assert all(use.tokens >= e for use, (e, _, _) in zip(without_cache[row].receipt.gates, got, strict=True))


SEVERAL = (
    Gated((), torch.empty(0), probe=OTHER, threshold=0.1, sharpness=0.1),
    Gated((), torch.empty(0), probe=PROBE, threshold=-0.5, sharpness=0.2, invert=True),
    Gated((), torch.empty(0), probe=EARLY, threshold=0.2, sharpness=None),
)
JOINED = [
    [
        Joint((1, 2), numbers(1), 2.0, join="all", gates=SEVERAL[:2]),
        replace(SEVERAL[0], layers=(2,), vector=numbers(2)),
    ],
    [Joint((1, 2), numbers(3), 2.0, join="any", gates=SEVERAL)],
    [Joint((1,), numbers(4), 3.0, "decode", join="any", gates=SEVERAL[1:]), Gated((0, 2), numbers(5))],
    [],
]


def test_gates_of_several_open_as_the_slow_model_says_and_are_reported_with_their_members():
    family = FAMILIES["llama"]
    slow = Slow().run(family, PROMPTS, JOINED)
    with SteeredModel(family.model(), gates=3) as model:
        out = assert_same(model, JOINED, slow)
        turned = [
            [replace(one, gates=one.gates[::-1]) if isinstance(one, Joint) else one for one in row] for row in JOINED
        ]
        again = assert_same(model, turned, slow)
        told = [[(one.receipt.identity, one.receipt.gates) for one in outputs] for outputs in (out, again)]
        assert told[0] == told[1]
    assert sum(0.2 < factor < 0.8 for factor in slow.factors.values()) > 10
    for row, steps in enumerate(JOINED[:3]):
        uses = out[row].receipt.gates
        (whole,) = (use for use in uses if use.probe == f"({steps[0].join})")
        members = [use for use in uses if use.within]
        assert {use.within for use in members} == {whole.gate}
        factors = [factor for (r, _, number), factor in slow.factors.items() if (r, number) == (row, 0)]
        assert (whole.tokens, whole.above_half) == (len(factors), sum(factor > 0.5 for factor in factors))
        assert whole.mean == pytest.approx(sum(factors) / len(factors), abs=1e-5)
        due = []
        for k in range(len(steps[0].gates)):
            owns = [own for (r, _, number, member), own in slow.owns.items() if (r, number, member) == (row, 0, k)]
            due.append((pytest.approx(sum(owns) / len(owns), abs=1e-5), len(owns), sum(own > 0.5 for own in owns)))
        found = [(use.mean, use.tokens, use.above_half) for use in members]
        assert len(found) == len(due)
        assert all(any(one == other for other in found) for one in due)
        assert len(uses) == 1 + len(members) + (row == 0)  # where an equal gate stands alone too


@pytest.mark.parametrize("kind", ["add", "ablate"])
def test_a_member_that_leaves_the_others_alone_changes_nothing_to_the_bit(kind):
    one = SEVERAL[0].spec()["gate"]
    still = {"probe": {"post_block": {"0": [0.0] * 32}}, "hard": True}
    is_open, shut = {**still, "threshold": -1.0}, {**still, "threshold": 1.0}
    vector = {"post_block": {"1": numbers(1).tolist(), "2": numbers(2).tolist()}}

    def logits(gate):
        recorder, step = Recorder(), {"kind": kind, "vector": vector, "gate": gate}
        spec = None if gate == "none" else {"interventions": [step]}
        model.generate(PROMPTS, spec, max_new_tokens=STEPS, do_sample=False, logits_processor=[recorder])
        return torch.stack(recorder.logits)

    with SteeredModel(FAMILIES["llama"].model()) as model:
        alone, always, never = logits(one), logits(None), logits("none")
        assert not torch.equal(alone, always)
        assert not torch.equal(alone, never)
        for gate, due in (
            ({"all": [is_open, one]}, alone),
            ({"any": [one, shut]}, alone),
            ({"all": [one, shut]}, never),
            ({"any": [one, is_open]}, always),
            ({"any": [is_open, {**is_open, "threshold": -2.0}, one]}, always),
        ):
            assert torch.equal(logits(gate), due)


def test_an_output_does_not_change_with_who_else_is_in_the_batch():
    with SteeredModel(FAMILIES["llama"].model()) as model:
        together = model.generate(PROMPTS, specs(MIXED), max_new_tokens=STEPS)
        for row, prompt in enumerate(PROMPTS):
            alone = model.generate([prompt], specs(MIXED)[row : row + 1], max_new_tokens=STEPS)
            assert alone[0].token_ids == together[row].token_ids
            for a, b in zip(alone[0].receipt.gates, together[row].receipt.gates, strict=True):
                assert (a.gate, a.tokens, a.above_half) == (b.gate, b.tokens, b.above_half)
                assert a.mean == pytest.approx(b.mean, abs=1e-5)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("is_open", [False, True])
def test_an_open_gate_equals_no_gate_and_a_shut_one_no_steering_to_the_bit(hard, is_open):
    gate = {"probe": {"post_block": {"0": [0.0] * 32}}, "threshold": -1e6 if is_open else 1e6, "hard": hard}
    vector = {"post_block": {"0": numbers(1).tolist(), "2": numbers(2).tolist()}}
    step = {"kind": "add", "vector": vector, "scale": 1.7}
    with SteeredModel(FAMILIES["llama"].model()) as model:
        gated, plain = Recorder(), Recorder()
        model.generate(
            PROMPTS, {"interventions": [{**step, "gate": gate}]}, max_new_tokens=STEPS, logits_processor=[gated]
        )
        other = {"interventions": [step]} if is_open else None
        model.generate(PROMPTS, other, max_new_tokens=STEPS, logits_processor=[plain])
    for ours, theirs in zip(gated.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_probes_are_registered_like_vectors_and_refused_like_them():
    probe = Probe.at(Site(0, HookPoint.POST_BLOCK), numbers(50, 0.5))
    calm = SteeringVector({Site(1, HookPoint.POST_BLOCK): numbers(1)})
    spec = {"interventions": [{"kind": "add", "vector": "calm", "gate": {"probe": "storm", "threshold": 0.0}}]}
    with SteeredModel(FAMILIES["llama"].model(), vectors={"calm": calm}, probes={"storm": probe}, gates=1) as model:
        assert dict(model.probes) == {"storm": probe}
        (out,) = model.generate(PROMPTS[:1], spec, max_new_tokens=2)
        assert [(use.probe, use.tokens) for use in out.receipt.gates] == [("storm", len(PROMPTS[0]) + 1)]
        model.register("storm", Probe.at(Site(1, HookPoint.POST_BLOCK), numbers(51)))
        with pytest.raises(SteeringError, match=r"steering\[1\]\.interventions\[0\]\.gate\.probe: there is no probe"):
            model.generate(PROMPTS[:2], [None, {"interventions": [spec["interventions"][0] | {"gate": {
                "probe": "strom", "threshold": 0.0}}]}], max_new_tokens=1)  # fmt: skip
        with pytest.raises(SteeringError, match=r"probes\['x'\]: has width 3"):
            model.register("x", Probe.at(Site(0, HookPoint.POST_BLOCK), [1.0] * 3))
        with pytest.raises(SteeringError, match=r"probes\['x'\]: is read at post_block:9: layer 9 does not exist"):
            model.register("x", Probe.at(Site(9, HookPoint.POST_BLOCK), numbers(1)))
        two = [spec["interventions"][0] | {"gate": {"probe": "storm", "threshold": t}} for t in (0.0, 1.0)]
        with pytest.raises(SteeringError, match="has 2 different gates on one token; this engine serves 1"):
            model.generate(PROMPTS[:1], {"interventions": two}, max_new_tokens=1)


def test_beams_and_samples_of_a_gated_prompt_are_counted():
    with SteeredModel(FAMILIES["llama"].model()) as model:
        many = model.generate(PROMPTS[:1], specs(MIXED)[:1], max_new_tokens=3, do_sample=True, num_return_sequences=2)
        beams = model.generate(PROMPTS[:1], specs(MIXED)[:1], max_new_tokens=3, num_beams=3)
    tokens = len(PROMPTS[0]) + 2
    assert [sorted(use.tokens for use in out.receipt.gates) for out in many] == [[2, tokens]] * 2
    assert sorted(use.tokens for use in beams[0].receipt.gates) == [6, 3 * tokens]
