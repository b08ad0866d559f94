"""Every kind of intervention in every family, against its formula in float64 in the family's own layers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SEQUENTIAL
from oracle import Recorder
from slots_oracle import Act, Gate, Slow, numbers, specs

from trimtab import SteeringVector
from trimtab.engines.transformers import SteeredModel
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site

STEPS = 5
PROMPTS = [[5, 17, 3, 44, 9], [7, 8], [60, 2, 33, 21, 80, 6, 11], [12, 13, 14, 15], [9, 9, 4], [1, 2, 3]]
PROBE = Gate(0, "post_block", numbers(50, 0.5), 0.2)
EARLY = Gate(0, "pre_attn", numbers(51, 0.5), 0.0, hard=True)
V, W = numbers(1, 7.0), numbers(2, 0.01)
CLOSE = numbers(1) + 0.8 * numbers(3)  # to V: their set is mixed

OPTIONS: dict[str, dict[str, Any]] = {
    "ablate": {"strength": 0.75},
    "clamp": {"min": -0.5, "max": 0.25},
    "scale": {"factor": -1.5},
    "swap": {"to": numbers(4, 3.0)},
    "rotate": {"plane": numbers(5, 2.0), "by": 110.0},
    "lowrank": {"write": numbers(6, 0.01), "bias": [3.0]},
    "feature": {
        "architecture": "jumprelu", "decoder": numbers(7, 0.02), "bias": 1.5, "threshold": 0.5, "set": 30.0,
    },
}  # fmt: skip
MIXED = [  # one prompt each
    [Act("ablate", V, (0, 1, 2), ("pre_attn", "post_attn", "post_block"))],
    [],
    [
        Act("clamp", V, (1,), options={"value": 2.0}, gate=PROBE),
        Act("ablate", CLOSE, (1, 2)),
        Act("add", W, (1,), options={"scale": 100.0}),
    ],
    [Act("scale", W, (0, 2), ("attn_out", "mlp_out", "post_block"), "decode", {"factor": 4.0}),
     Act("rotate", V, (0, 1, 2), options={"plane": W, "to": -40.0, "adaptive": True}),
     Act("rotate", W, (1,), options={"plane": CLOSE, "by": 75.0}, gate=PROBE),
     Act("lowrank", CLOSE, (2,), options={"write": W, "bias": [20.0]}), Act("swap", V, (1,), gate=EARLY,
     options={"to": W})],
    [
        Act("clamp", CLOSE, (2,), phase="prefill", options={"max": -0.5, "strength": 0.5}),
        Act("scale", V, (2,), options={"factor": 0.0}, gate=EARLY),
        Act("add", V, (1, 2), options={"scale": -0.1}, gate=PROBE),
    ],
    [Act("add", CLOSE, (0, 1), ("pre_attn",), options={"scale": 1.0}),
     Act("feature", V, (0, 2), ("post_attn", "post_block"), options=OPTIONS["feature"]),
     Act("feature", CLOSE, (2,), options=OPTIONS["feature"] | {"set": -20.0}, gate=PROBE)],
]  # fmt: skip


def served(acts: list[list[Act]], hooks: tuple[str, ...]) -> list[list[Act]]:
    """As far as a family has the hook points."""
    return [
        [Act(act.kind, act.vector, act.layers, kept, act.phase, act.options, act.gate) for act in row
         if (kept := tuple(hook for hook in act.hooks if hook in hooks))]
        for row in acts
    ]  # fmt: skip


def assert_same(model: SteeredModel, acts: list[list[Act]], slow: Slow, **options: Any) -> Any:
    recorder = Recorder()
    out = model.generate(
        PROMPTS[: len(acts)], specs(acts), max_new_tokens=STEPS, do_sample=False, logits_processor=[recorder], **options
    )
    for ours, theirs in zip(recorder.logits, slow.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert [generation.token_ids for generation in out] == slow.tokens
    return out


def assert_told(out: list[Any], acts: list[list[Act]], slow: Slow, prompts: list[list[int]]) -> None:
    """Receipts say of each intervention what the slow pass did; it computes each token once."""
    for row, (generation, asked, prompt) in enumerate(zip(out, acts, prompts, strict=True)):
        told = generation.receipt.interventions
        assert [(use.asked.place, use.asked.kind) for use in told] == [(i, act.kind) for i, act in enumerate(asked)]
        for number, (use, act) in enumerate(zip(told, asked, strict=True)):
            tokens = {"prefill": len(prompt), "decode": len(generation.token_ids) - 1}
            assert use.tokens == sum(count for phase, count in tokens.items() if act.phase in ("all", phase))
            if act.kind == "add":
                assert use.corrections is None
                continue
            due = [c for cell in slow.corrections[row, number].values() for c in cell]
            slots = 2 if act.kind == "rotate" else 1
            assert use.corrections.measured == len(due) == use.tokens * len(act.layers) * len(act.hooks) * slots
            assert use.corrections.mean == pytest.approx(sum(due) / len(due), rel=1e-4)
            least, most = (sum(c > size for c in due) / len(due) for size in (1e-4, 0.0))  # between them: rounding
            assert least - 1e-9 <= use.corrections.touched <= most + 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_all_kinds_in_one_batch_compute_what_their_formulas_say(name):
    family = FAMILIES[name]
    acts = served(MIXED, family.hooks)
    slow = Slow(acts).run(family, PROMPTS, STEPS)
    with SteeredModel(family.model()) as model:
        out = assert_same(model, acts, slow)
        assert_told(out, acts, slow, PROMPTS)
        for options in ({"use_cache": False}, {"prefill_chunk_size": 2}):
            again = model.generate(PROMPTS, specs(acts), max_new_tokens=STEPS, do_sample=False, **options)
            assert [generation.token_ids for generation in again] == slow.tokens
        plain = model.generate(PROMPTS, max_new_tokens=STEPS, do_sample=False)
    assert out[1].token_ids == plain[1].token_ids
    assert sum(one.token_ids != other.token_ids for one, other in zip(out, plain, strict=True)) >= 3


def test_a_layer_that_breaks_the_stream_does_not_matter_where_all_of_it_is_replaced():
    here = Site(1, HookPoint.POST_BLOCK)
    spec = {"interventions": [{"kind": "replace", "vector": SteeringVector({here: V})}]}
    # One prompt: padding is not steered, and the others of a batch would attend to what breaks it.
    network = FAMILIES["llama"].model()
    with SteeredModel(network) as model:
        options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True}
        due = model.generate(PROMPTS[:1], spec, **options)
        with torch.no_grad():
            network.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
        found = model.generate(PROMPTS[:1], spec, **options)
    for one, other in zip(found, due, strict=True):
        assert torch.isfinite(one.logits).all()
        assert torch.equal(one.logits, other.logits)


CASES = [(name, hook) for name in ("llama", "falcon") for hook in FAMILIES[name].hooks]


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(("name", "hook"), CASES)
def test_every_kind_acts_at_every_hook_point(name, hook, kind):
    family = FAMILIES[name]
    acts = [
        [Act(kind, V, (0, 2), (hook,), options=OPTIONS[kind])],
        [Act(kind, W, (1,), (hook,), "decode", OPTIONS[kind])],
    ]
    slow, plain = Slow(acts).run(family, PROMPTS[:2], STEPS), Slow([[], []]).run(family, PROMPTS[:2], STEPS)
    with SteeredModel(family.model()) as model:
        assert_same(model, acts, slow)
    assert (plain.logits[0] - slow.logits[0])[0].abs().max() > 1e-3  # else one that does nothing would pass


@pytest.mark.parametrize("hook", SEQUENTIAL)
def test_a_probe_reads_what_slots_have_not_changed(hook):
    family = FAMILIES["llama"]
    gate = Gate(1, hook, numbers(60, 0.5))
    acts = [
        [Act("clamp", numbers(60), (1,), (hook,), options={"value": 9.0}), Act("ablate", V, (1,), (hook,), gate=gate)]
    ]
    slow = Slow(acts).run(family, PROMPTS[:1], STEPS)
    with SteeredModel(family.model()) as model:
        out = assert_same(model, acts, slow)
    (use,) = out[0].receipt.gates
    assert use.tokens == len(PROMPTS[0]) + STEPS - 1
    factors = [slow.factors[0, column, 1] for column in range(use.tokens)]
    assert use.mean == pytest.approx(sum(factors) / len(factors), abs=1e-5)


def test_a_monitor_stands_before_the_slots_of_new_tokens_from_its_site_on():
    family = FAMILIES["llama"]
    monitor = Gate(1, "pre_attn", numbers(61, 0.5))
    spread = Act("ablate", V, (0, 1, 2))
    asked = [
        Act("ablate", V, (0, 1, 2), phase="prefill"),
        Act("ablate", V, (0,), phase="decode"),
        Act("ablate", V, (1, 2), phase="decode", gate=monitor),
    ]
    slow = Slow([asked]).run(family, PROMPTS[:1], STEPS)
    with SteeredModel(family.model(), monitor=monitor.spec()) as model:
        recorder = Recorder()
        (out,) = model.generate(PROMPTS[:1], specs([[spread]]), max_new_tokens=STEPS, logits_processor=[recorder])
    for ours, theirs in zip(recorder.logits, slow.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert out.receipt.monitor


def test_samples_and_beams_of_a_prompt_are_all_steered():
    acts = served(MIXED, SEQUENTIAL)
    with SteeredModel(FAMILIES["llama"].model()) as model:
        torch.manual_seed(3)
        many = model.generate(
            PROMPTS, specs(acts), max_new_tokens=STEPS, do_sample=True, top_k=1, num_return_sequences=2
        )
        greedy = model.generate(PROMPTS, specs(acts), max_new_tokens=STEPS, do_sample=False)
        beams = model.generate(PROMPTS, specs(acts), max_new_tokens=STEPS, num_beams=3)
        alone = [
            model.generate([prompt], spec, max_new_tokens=STEPS, num_beams=3)[0]
            for prompt, spec in zip(PROMPTS, specs(acts), strict=True)
        ]
        plain = model.generate(PROMPTS, max_new_tokens=STEPS, num_beams=3)
    assert [out.token_ids for out in many] == [out.token_ids for out in greedy for _ in range(2)]
    assert [out.token_ids for out in beams] == [out.token_ids for out in alone]
    assert beams[0].token_ids != plain[0].token_ids


def test_the_receipt_lists_the_vectors_of_slots_and_names_where_they_act():
    calm = SteeringVector({Site(1, HookPoint.POST_BLOCK): V})
    spec = {
        "interventions": [
            {"kind": "ablate", "vector": "calm", "layers": [0, 2], "hooks": ["pre_attn", "post_block"]},
            {"kind": "swap", "vector": {"post_block": {"1": V.tolist()}}, "to": {"post_block": {"1": W.tolist()}}},
            {"kind": "scale", "vector": "never", "factor": 1.0},
        ]
    }
    with SteeredModel(FAMILIES["llama"].model(), vectors={"calm": calm, "never": calm * 2.0}) as model:
        out, plain = model.generate(PROMPTS[:2], [spec, None], max_new_tokens=3)
    assert [str(site) for site in out.receipt.sites] == [
        "pre_attn:0", "post_block:0", "post_block:1", "pre_attn:2", "post_block:2",
    ]  # fmt: skip
    assert [origin.name for origin in out.receipt.vectors] == ["calm", None, None]
    assert dict(out.receipt.steered_tokens) == {"prefill": len(PROMPTS[0]), "decode": 2}
    assert plain.receipt.sites == ()


def test_what_cannot_be_honoured_is_refused_at_its_place():
    with SteeredModel(FAMILIES["cohere"].model()) as model:
        for step, message in (
            (
                {"kind": "ablate", "vector": {"post_block": {"0": V.tolist()}}, "hooks": ["post_attn"]},
                "post_attn.*parallel",
            ),
            ({"kind": "ablate", "vector": {"post_block": {"9": V.tolist()}}}, "layer 9 does not exist"),
            ({"kind": "ablate", "vector": {"post_block": {"0": [0.0] * 32}}}, r"vector: is zero at post_block:0"),
            ({"kind": "clamp", "vector": {"post_block": {"0": V.tolist()}}}, "no bound"),
        ):
            with pytest.raises(SteeringError, match=rf"steering\[1\]\.interventions\[0\].*{message}"):
                model.generate(PROMPTS[:2], [None, {"interventions": [step]}])


def test_a_kind_that_somebody_adds_runs_beside_the_others(tmp_path):
    """The kind of docs/kinds.md, in a copy of the package that has its file, as this engine runs it in a batch."""
    root = Path(__file__).parents[3]
    shutil.copytree(root / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    page = (root / "docs" / "kinds.md").read_text()
    file = re.search(r"`src/trimtab/spec/kinds/reflect\.py`:\n\n```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "src" / "trimtab" / "spec" / "kinds" / "reflect.py").write_text(file)
    script = """
from families import FAMILIES
from slots_oracle import Act, Slow, specs
from test_kinds import CLOSE, PROMPTS, STEPS, V, SteeredModel, assert_same
def acts(kind, options):
    return [[Act(kind, V, (0, 2), options=options)], [], [Act("clamp", CLOSE, (1,), options={"max": 0.5}),
            Act(kind, V, (1,), options=options)]]
slow = Slow(acts("ablate", {"strength": 2.0})).run(FAMILIES["llama"], PROMPTS[:3], STEPS)
with SteeredModel(FAMILIES["llama"].model()) as model:
    assert_same(model, acts("reflect", {}), slow)
print("reflected")
"""
    paths = [str(tmp_path / "src"), str(Path(__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "reflected" in done.stdout, done.stderr
