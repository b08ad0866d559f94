"""An engine behind one monitor, against the embedded engine behind the same one.

Arguments: mode ("eager", "compiled"), or "tp" or "pp" for two worker processes; number of requests.
"""

import sys

import numpy as np
import where

from support import (
    HIDDEN,
    SCRATCH,
    SLOTS,
    differences,
    eight_specs,
    engine,
    generate,
    oracle,
    preemptions,
    random_prompts,
    random_spec,
    report,
    slot,
    slot_specs,
    status,
    tight_engine,
    tiny_model,
    two_ranks,
)
from trimtab import Probe
from trimtab.ops.gate_buffers import decides, gate_count
from trimtab.sites import HookPoint, Site

HOOKS = ["pre_attn", "mlp_out", "post_block"]


def monitor(layer=1, hook="post_block", **options):
    """The same monitor as a setting of vLLM and as an argument of the embedded engine."""
    direction = np.random.default_rng(17).standard_normal(HIDDEN).astype(np.float32)
    probe = Probe.at(Site(layer, HookPoint(hook)), direction, 0.25)
    path = SCRATCH / f"{hook}-{layer}.safetensors"
    probe.save(path)
    numbers = {"threshold": 0.5, "sharpness": 0.3} | options
    return {"probe": str(path)} | numbers, {"probe": probe} | numbers


def mixed_specs(slotted=range(4)):
    """Unsteered, steered in either phase or both, at, before and after the monitor's site; one behind a gate. Slots in
    those layers alone that are `slotted`."""
    gate = {"probe": {"post_block": {"0": np.random.default_rng(5).standard_normal(HIDDEN).round(4).tolist()}}}
    gated = random_spec(31, layers=[1, 2], strength=1.5)["interventions"]
    gated[0]["gate"] = gate | {"threshold": 0.0, "sharpness": 0.2}
    return [
        *eight_specs(),
        {"interventions": [*gated, *random_spec(32, layers=[2, 3], strength=1.5)["interventions"]]},
        random_spec(33, hooks=HOOKS, layers=[0, 1, 2], strength=0.7),
        slot_specs()[1],
        {"interventions": [slot("clamp", 34, slotted[:3], hooks=HOOKS, value=4.0), slot("ablate", 35, [1, 2])]},
        {"interventions": [*gated, {**slot("scale", 36, slotted[1::2], factor=-3.0), "gate": gated[0]["gate"]}]},
        {"interventions": [slot("swap", 44, slotted[::3], to=slot("swap", 45, slotted[::3])["vector"])]},
    ]


def main(mode, requests):
    folder, model = tiny_model()
    setting, ours = monitor()
    settings = SLOTS | {"slots": 2, "monitor": setting, "hook_points": HOOKS, "probe_layers": [0]}
    slotted = range(4)
    if mode == "compiled":  # at six sites, not at twelve
        slotted = range(1, 3)
        settings["slot_layers"] = list(slotted)
    prompts = random_prompts([3 + (7 * i) % 61 for i in range(requests)])
    specs = [mixed_specs(slotted)[i % 14] for i in range(requests)]
    counts = [8 + i % 7 for i in range(requests)]
    expected = oracle(model, prompts, specs, counts, monitor=ours)
    unmonitored = oracle(model, prompts, specs, counts)
    llm = engine(folder, steering=settings, mode=mode)
    found = generate(llm, prompts, specs, counts)
    outcome = {
        "differs from unmonitored": sum(e != u for e, u in zip(expected, unmonitored, strict=True)),
        "mixed": differences(found, expected),
        "again": differences(generate(llm, prompts, specs, counts), expected),
        "alone": differences([generate(llm, [prompts[i]], [specs[i]], counts[i])[0] for i in range(8)], expected[:8]),
        "unsteered": differences(
            generate(llm, prompts, [None] * requests, counts), oracle(model, prompts, [None] * requests, counts)
        ),
        "next turn": next_turn(llm, model, ours),
        "status": status(llm),
        "roles": roles(llm),
        **where.alone(llm, model, 7, ours),
    }
    if mode == "eager":
        outcome |= others(folder, model, settings, ours)
    report(outcome)


def next_turn(llm, model, ours):
    """An answer sent again as part of a prompt, under the same spec: now it is prompt, and has its full strength."""
    prompts, spec = random_prompts([70, 90], seed=9), random_spec(3)
    answers = generate(llm, prompts, [spec] * 2, 40)
    longer = [prompt + answer + [7] for prompt, answer in zip(prompts, answers, strict=True)]
    return differences(generate(llm, longer, [spec] * 2, 12), oracle(model, longer, [spec] * 2, 12, monitor=ours))


def others(folder, model, settings, ours):
    """A prompt in chunks, preemption, a site of two parts and one of a branch, and an engine without a monitor."""
    long, specs = random_prompts([150, 190, 97, 130], seed=3), [mixed_specs()[i] for i in (1, 9, 2, 8)]
    short = engine(folder, steering=settings, max_num_batched_tokens=48, max_num_seqs=8)
    found = {"chunked": differences(generate(short, long, specs), oracle(model, long, specs, monitor=ours))}
    prompts = random_prompts([60 + i for i in range(8)], seed=5)
    tight = tight_engine(folder, steering=settings)
    answers = generate(tight, prompts, mixed_specs()[1:9], 40)
    found["preempted"] = differences(answers, oracle(model, prompts, mixed_specs()[1:9], 40, monitor=ours))
    found["preemptions"] = preemptions(tight)
    specs = [random_spec(33 + i, hooks=HOOKS, strength=0.7) for i in range(4)]
    kept = []  # an engine that goes takes the others' process groups with it
    for at in ((2, "pre_attn"), (1, "mlp_out")):
        setting, same = monitor(*at, invert=True)
        llm = engine(folder, steering={"monitor": setting, "hook_points": HOOKS})
        kept.append(llm)
        found.setdefault("alone roles", roles(llm))
        found[at[1]] = differences(generate(llm, long, specs, 12), oracle(model, long, specs, 12, monitor=same))
    found["plain roles"] = roles(engine(folder, steering={"hook_points": HOOKS}))
    return found


def roles(llm):
    """How many gates a token may have at each site, and whether a probe is read there."""
    modules = llm.llm_engine.model_executor.driver_worker.worker._trimtab.attachment.modules
    return {str(site): [gate_count(module, site.hook), decides(module, site.hook)] for site, module in modules.items()}


def parallel(kind, requests, mode="eager"):
    """Two ranks. Under pipeline parallelism the second stage, of layers 2 and 3, holds the monitor."""
    folder, model = tiny_model()
    setting, ours = monitor(2 if kind == "pp" else 1)
    specs = [eight_specs()[i % 8] for i in range(requests)]
    prompts = random_prompts([4 + (5 * i) % 37 for i in range(requests)])
    expected = oracle(model, prompts, specs, 12, monitor=ours)
    unmonitored = oracle(model, prompts, specs, 12)
    options = {"mode": mode, "max_num_batched_tokens": 64} | two_ranks(kind)
    llm = engine(folder, steering={"monitor": setting}, **options)
    outcome = {
        "differs from unmonitored": sum(e != u for e, u in zip(expected, unmonitored, strict=True)),
        "mixed": differences(generate(llm, prompts, specs, 12), expected),
        "status": status(llm),
    }
    if kind == "pp":
        try:
            engine(folder, steering={"monitor": monitor(1)[0]}, **options)
            outcome["across stages"] = ""
        except ValueError as error:
            outcome["across stages"] = str(error)
    report(outcome)


if __name__ == "__main__":
    (parallel if sys.argv[1] in ("tp", "pp") else main)(sys.argv[1], int(sys.argv[2]))
