"""Mixed batches, chunked prefill and preemption, against the embedded engine. Arguments: mode, requests."""

import sys

from support import (
    differences,
    eight_specs,
    engine,
    generate,
    oracle,
    preemptions,
    random_prompts,
    random_spec,
    report,
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
    long = random_prompts([150, 190, 97, 130], seed=3)
    long_specs = [random_spec(11, phase="prefill"), random_spec(12, phase="decode"), random_spec(13), None]
    if mode == "eager":
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        outcome["reloaded"] = differences(generate(llm, prompts[:16], specs[:16], counts[:16]), expected[:16])
        outcome |= _chunked(folder, model, long, long_specs) | _preempted(folder, model)
    report(outcome)


def _chunked(folder, model, prompts, specs):
    """A budget smaller than every prompt, so that a prompt takes several steps beside the others' answers."""
    llm = engine(folder, steering={}, max_num_batched_tokens=48, max_num_seqs=8)
    expected = oracle(model, prompts, specs)
    return {"chunked": differences(generate(llm, prompts, specs), expected)}


def _preempted(folder, model):
    """A batch that the KV cache has no room for: requests are thrown out and computed anew."""
    prompts = random_prompts([60 + i for i in range(8)], seed=5)
    specs = [random_spec(20 + i, phase=("all", "prefill", "decode")[i % 3]) if i % 4 else None for i in range(8)]
    llm = tight_engine(folder, steering={})
    found = generate(llm, prompts, specs, 40)
    return {
        "preempted": differences(found, oracle(model, prompts, specs, 40)),
        "preemptions": preemptions(llm),
        "after preemption": status(llm),
    }


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
