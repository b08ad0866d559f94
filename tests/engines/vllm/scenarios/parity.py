"""Mixed batches, chunked prefill and preemption, against the embedded engine. Arguments: mode, requests."""

import sys

import where
from guesses import can_guess

from support import (
    ALL_KINDS,
    SLOTS,
    corrections,
    differences,
    eight_specs,
    engine,
    generate,
    oracle,
    preemptions,
    random_prompts,
    random_spec,
    rarer_specs,
    receipts,
    report,
    slot,
    slot_specs,
    status,
    tight_engine,
    tiny_model,
    unmeasured,
)


def main(mode: str, requests: int) -> None:
    folder, model = tiny_model()
    prompts = random_prompts([3 + (7 * i) % 61 for i in range(requests)])
    specs = [eight_specs()[i % 8] for i in range(requests)]
    counts = [6 + i % 5 for i in range(requests)]
    expected = oracle(model, prompts, specs, counts)
    plain = oracle(model, prompts, [None] * requests, counts)

    llm = engine(folder, steering={}, mode=mode)
    outcome = {
        "steered differently": sum(e != p for e, p in zip(expected, plain, strict=True)),
        "mixed": differences(generate(llm, prompts, specs, counts), expected),
        "unsteered": differences(generate(llm, prompts, [None] * requests, counts), plain),
        "again": differences(generate(llm, prompts, specs, counts), expected),  # prompts now in the prefix cache
        "status": status(llm),
        "unmeasured": unmeasured,
    }
    if mode == "eager":
        outcome |= where.thrown_out(llm, model)
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        outcome["reloaded"] = differences(generate(llm, prompts[:16], specs[:16], counts[:16]), expected[:16])
        outcome |= _preempted(folder, model)
        outcome |= where.preempted(folder, model, SLOTS)
        outcome |= where.guessed(folder, model, {}) if can_guess() else {}
    report(outcome | _slots(folder, model, mode, requests))


def _slots(folder, model, mode, requests):
    """Every kind in one batch with what is added and with nothing, at a budget smaller than many prompts, so that a
    prompt takes several steps beside the others' answers."""
    long = [random_spec(11, phase="prefill"), random_spec(12, phase="decode"), random_spec(13), None]
    kinds = [*slot_specs(), *rarer_specs(), *long]
    specs = [kinds[i % len(kinds)] for i in range(requests)]
    prompts = random_prompts([5 + (37 * i) % 83 for i in range(requests - 4)] + [150, 190, 97, 130], seed=3)
    expected, plain = oracle(model, prompts, specs), oracle(model, prompts, [None] * requests)
    llm = engine(folder, steering=SLOTS | {"kinds": ALL_KINDS}, mode=mode, max_num_batched_tokens=48, max_num_seqs=8)
    outcome = {
        "slots differ": sum(e != p for e, p in zip(expected, plain, strict=True)),
        "slots": differences(generate(llm, prompts, specs), expected),
        "slots again": differences(generate(llm, prompts, specs), expected),  # prompts now in the prefix cache
        "slots alone": differences(
            [generate(llm, prompts[i : i + 1], specs[i : i + 1])[0] for i in range(4)], expected[:4]
        ),
        "slots status": status(llm),
        "slots receipts": receipts(llm, model, prompts[:8], specs[:8], [1, 2, 5, 1, 1, 3, 4, 2]),
        "slots refused": _refused(llm),
        "corrections": corrections(
            llm, model, random_prompts([5 + (37 * i) % 83 for i in range(15)], 9), kinds[:15], 5
        ),
    }
    prompts = random_prompts([5 + (29 * i) % 83 for i in range(requests // 2)], seed=4)
    return outcome | where.placed(llm, model, prompts, where.mixed_specs(model, prompts, kinds))


def _refused(llm):
    """What a request is told that asks for more slots than there are."""
    try:
        generate(llm, [[5, 6]], [{"interventions": [slot("ablate", 60 + i, [1]) for i in range(4)]}], 1)
    except ValueError as error:
        return str(error)
    return ""


def _preempted(folder, model):
    """A batch that the KV cache has no room for: requests are thrown out and computed anew."""
    prompts = random_prompts([60 + i for i in range(8)], seed=5)
    specs = [random_spec(20 + i, phase=("all", "prefill", "decode")[i % 3]) if i % 4 else None for i in range(8)]
    specs[2], specs[4], specs[7] = (slot_specs()[i] for i in (2, 4, 9))
    llm = tight_engine(folder, steering=SLOTS)
    found = generate(llm, prompts, specs, 40)
    return {
        "preempted": differences(found, oracle(model, prompts, specs, 40)),
        "preemptions": preemptions(llm),
        "after preemption": status(llm),
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
