"""Gated, ungated and unsteered requests in one batch, against the embedded engine.

Arguments: mode ("eager", "compiled"), or "tp" or "pp" for two worker processes; number of requests.
"""

import sys

import numpy as np

from support import (
    HIDDEN,
    differences,
    eight_specs,
    engine,
    generate,
    oracle,
    outputs_of,
    preemptions,
    random_prompts,
    random_spec,
    receipts,
    report,
    status,
    tight_engine,
    tiny_model,
    two_ranks,
)

SETTINGS = {"probe_layers": [0, 1], "gates": 4, "hook_points": ["pre_attn", "post_attn", "mlp_out", "post_block"]}


def direction(seed):
    return np.random.default_rng(seed).standard_normal(HIDDEN).round(4).tolist()


def gated(seed, layers, *, probe=(0, "post_block"), hook="post_block", phase="all", **options):
    """One intervention behind a gate of its own: a random probe, scaled so that factors spread over (0, 1)."""
    layer, at = probe
    step = random_spec(seed, layers=layers, hooks=(hook,), phase=phase, strength=1.5)["interventions"][0]
    return {**step, "gate": {"probe": {at: {str(layer): direction(100 + seed)}}, "threshold": 0.0} | options}


def jointly(join, step, *others):
    """An intervention behind the gate of several: its own and those of `others`."""
    return {**step, "gate": {join: [one["gate"] for one in (step, *others)]}}


def gated_specs():
    """Probes at several sites, soft, hard and inverted, in both phases or one, alone and several to a gate, next to
    ungated steering."""
    return [
        {"interventions": [gated(1, [0, 1, 2, 3], sharpness=0.2)]},
        {"interventions": [gated(2, [1, 2], probe=(1, "post_block"), hard=True)]},
        None,
        {"interventions": [gated(3, [0, 3], probe=(0, "pre_attn"), invert=True, sharpness=0.3)]},
        eight_specs()[5],
        {
            "interventions": [
                *random_spec(4, layers=[1, 3])["interventions"],
                jointly(
                    "any",
                    gated(5, [1, 2], threshold=1.0),
                    gated(6, [], probe=(1, "pre_attn"), threshold=0.5, sharpness=0.3),
                    gated(7, [], hard=True, threshold=2.0),
                ),
            ]
        },
        {
            "interventions": [
                gated(6, [2], phase="prefill", probe=(1, "pre_attn"), sharpness=0.5),
                gated(7, [0, 2], phase="decode", hard=True, invert=True),
                gated(8, [3], probe=(1, "mlp_out"), threshold=0.1),
                *random_spec(9, layers=[0])["interventions"],
            ]
        },
        {
            "interventions": [
                gated(1, [1], hook="mlp_out", sharpness=0.2),
                jointly("all", gated(2, [3], probe=(1, "post_attn"), sharpness=0.1), gated(1, [], sharpness=0.2)),
                gated(3, [0, 1, 3], probe=(0, "post_attn"), hook="post_attn", sharpness=0.3),
            ]
        },
    ]


def lowered_specs():
    """Gates that the row monitor can stand in for: alone, beside steering at other sites, two at once; and some that
    only look like it: hard, inverted, and beside steering at their own site."""
    soft = gated(11, [0], sharpness=0.2)
    return [
        {"interventions": [soft]},
        {"interventions": [{**soft, "phase": "decode"}, *random_spec(12, layers=[1, 3])["interventions"]]},
        None,
        {
            "interventions": [
                gated(13, [1], probe=(1, "pre_attn"), hook="pre_attn", sharpness=0.3),
                gated(14, [1], probe=(1, "mlp_out"), hook="mlp_out", phase="decode", sharpness=2.0),
            ]
        },
        {"interventions": [gated(15, [0], hard=True, phase="decode"), soft]},
        {"interventions": [gated(16, [1], probe=(1, "post_block"), invert=True, sharpness=0.2)]},
        {"interventions": [{**soft, "scale": 2.0}, *random_spec(17, layers=[0, 2])["interventions"]]},
        {"interventions": [gated(18, [1], probe=(1, "post_block"), phase="decode", sharpness=0.1)]},
    ]


def lowered_gates(spec):
    """How many gates of a spec become probes of rows: at most one per site, where nothing else is steered."""
    free, steps = set(), (spec or {"interventions": []})["interventions"]
    steered = {site for step in steps if "gate" not in step and step["phase"] != "prefill" for site in sites(step)}
    for step in (step for step in steps if "probe" in step.get("gate", ()) and step["phase"] != "prefill"):
        gate, (probe, *_) = step["gate"], sites({"vector": step["gate"]["probe"]})
        if not (gate.get("hard") or gate.get("invert") or probe in steered) and sites(step) == [probe]:
            free.add(probe)
    return len(free)


def sites(step):
    return [(layer, hook) for hook, layers in step["vector"].items() for layer in layers]


def main(mode, requests):
    folder, model = tiny_model()
    prompts = random_prompts([3 + (7 * i) % 61 for i in range(requests)])
    specs = [gated_specs()[i % 8] for i in range(requests)]
    counts = [6 + i % 5 for i in range(requests)]
    expected = oracle(model, prompts, specs, counts)
    ungated = oracle(model, prompts, [without_gates(spec) for spec in specs], counts)
    unsteered = oracle(model, prompts, [None] * requests, counts)

    llm = engine(folder, steering=SETTINGS, mode=mode)
    outcome = {
        "differs from ungated": sum(e != u for e, u in zip(expected, ungated, strict=True)),
        "differs from unsteered": sum(e != u for e, u in zip(expected, unsteered, strict=True)),
        "mixed": differences(generate(llm, prompts, specs, counts), expected),
        "totals": totals(status(llm)),
        "again": differences(generate(llm, prompts, specs, counts), expected),  # prompts now in the prefix cache
        "alone": differences([generate(llm, [prompts[i]], [specs[i]], counts[i])[0] for i in range(8)], expected[:8]),
        "unsteered": differences(generate(llm, prompts, [None] * requests, counts), unsteered),
        "tokens": evaluated(prompts, specs, counts),
        "receipts": receipts(llm, model, prompts[:8], specs[:8], [1, 2, 5, 1, 1, 3, 4, 2]),
        "status": status(llm),
        "refusals": refusals(llm),
        "lowered": lowered(llm, folder, model, mode, requests),
    }
    if mode == "eager":
        outcome |= chunked(folder, model) | preempted(folder, model)
    report(outcome)


def lowered(plain, folder, model, mode, requests):
    """The same requests in an engine with the setting `row_monitor` and in one without."""
    prompts = random_prompts([3 + (5 * i) % 67 for i in range(requests)], seed=7)
    specs = [(lowered_specs() if i % 3 else gated_specs())[i % 8] for i in range(requests)]
    counts = [6 + i % 5 for i in range(requests)]
    expected = oracle(model, prompts, specs, counts)
    ungated = oracle(model, prompts, [without_gates(spec) for spec in specs], counts)
    few = {"max_rows": 20}  # requests wait for rows, which the engine core counts as the worker does
    llm = engine(folder, steering=SETTINGS | {"row_monitor": True} | few, mode=mode)
    found = generate(llm, prompts, specs, counts)
    outputs = outputs_of(llm, prompts[:8], specs[:8], 4)  # prompts now in the prefix cache
    return {
        "differs from ungated": sum(e != u for e, u in zip(expected, ungated, strict=True)),
        "on": differences(found, expected),
        "off": differences(generate(plain, prompts, specs, counts), expected),
        "again": differences([list(output.outputs[0].token_ids) for output in outputs], [e[:4] for e in expected[:8]]),
        "gates": [sum(use["lowered"] for use in status(llm)[0]["gates"]), *map(lowered_gates, specs + specs[:8])],
        "identities": differences(identities(outputs), identities(outputs_of(plain, prompts[:8], specs[:8], 4))),
        "status": status(llm),
    }


def identities(outputs):
    return [output.steering["identity"] if hasattr(output, "steering") else None for output in outputs]


def parallel(kind, requests, mode="eager"):
    """Two ranks. Under pipeline parallelism the second stage holds layers 2 and 3."""
    folder, model = tiny_model()
    early = [gated(1, [0, 1], sharpness=0.2)]
    hard = gated(2, [2, 3], probe=(2, "post_block"), hard=True)
    late = [jointly("any", hard, gated(3, [], probe=(2, "pre_attn"), invert=True, threshold=3.0))]
    both = [*early, *late, *random_spec(4, layers=[1, 3])["interventions"]]
    both.append(gated(5, [2], probe=(2, "post_block"), phase="decode", sharpness=0.2))
    specs = [{"interventions": steps} if steps else None for steps in (early, late, both, [])]
    specs = [specs[i % 4] for i in range(requests)]
    prompts = random_prompts([4 + (5 * i) % 37 for i in range(requests)])
    expected = oracle(model, prompts, specs)
    settings = SETTINGS | {"gates": 4, "probe_layers": [0, 2], "row_monitor": True}
    llm = engine(folder, steering=settings, mode=mode, max_num_batched_tokens=64, **two_ranks(kind))
    outcome = {
        "differs from unsteered": sum(
            e != p for e, p in zip(expected, oracle(model, prompts, [None] * requests), strict=True)
        ),
        "mixed": differences(generate(llm, prompts, specs), expected),
        "status": status(llm),
        "tokens": evaluated(prompts, specs, [8] * requests),
        "lowered": sum(map(lowered_gates, specs)),
    }
    try:
        generate(llm, [[5, 6]], [{"interventions": [gated(1, [0, 1, 2])]}], 1)
        outcome["across stages"] = ""
    except ValueError as error:
        outcome["across stages"] = str(error)
    report(outcome)


def without_gates(spec):
    if spec is None:
        return None
    return {"interventions": [{k: v for k, v in s.items() if k != "gate"} for s in spec["interventions"]]}


def evaluated(prompts, specs, counts):
    """Tokens on which gates are evaluated: of each gate, those of its phase but the last sampled one; of a gate of
    several each of its members counts beside it."""
    total = 0
    for prompt, spec, count in zip(prompts, specs, counts, strict=True):
        for step in (spec or {"interventions": []})["interventions"]:
            phase = step["phase"] if "gate" in step and not lowered_gates({"interventions": [step]}) else "none"
            tokens = len(prompt) * (phase in ("all", "prefill")) + (count - 1) * (phase in ("all", "decode"))
            total += tokens * (1 + sum(len(step.get("gate", {}).get(join, ())) for join in ("all", "any")))
    return total


def totals(statuses):
    return sum(use["tokens"] for use in statuses[0]["gates"])


def refusals(llm):
    """What a request is told whose gate this engine does not serve."""
    found = {}
    for name, steps in {
        "probe site": [gated(1, [3], probe=(2, "post_block"))],
        "too many": [gated(seed, [3]) for seed in range(5)],
        "unknown probe": [{**gated(1, [3]), "gate": {"probe": "joy", "threshold": 0.0}}],
    }.items():
        try:
            generate(llm, [[5, 6]], [{"interventions": steps}], 1)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def chunked(folder, model):
    """A budget smaller than every prompt, so that a prompt takes several steps beside the others' answers."""
    prompts, specs = random_prompts([150, 190, 97, 130], seed=3), [gated_specs()[i] for i in (0, 6, 5, 2)]
    llm = engine(folder, steering=SETTINGS, max_num_batched_tokens=48, max_num_seqs=8)
    return {"chunked": differences(generate(llm, prompts, specs), oracle(model, prompts, specs))}


def preempted(folder, model):
    """A batch that the KV cache has no room for: requests are thrown out and computed anew."""
    prompts = random_prompts([60 + i for i in range(8)], seed=5)
    specs = [(lowered_specs() if i % 2 else gated_specs())[i] for i in range(8)]
    llm = tight_engine(folder, steering=SETTINGS | {"row_monitor": True})
    return {
        "preempted": differences(generate(llm, prompts, specs, 40), oracle(model, prompts, specs, 40)),
        "preemptions": preemptions(llm),
    }


if __name__ == "__main__":
    (parallel if sys.argv[1] in ("tp", "pp") else main)(sys.argv[1], int(sys.argv[2]))
