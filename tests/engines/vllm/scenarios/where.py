"""Requests that say where they are steered: their specs, and what an engine makes of them beside all others.

The oracle is the embedded engine, which runs one pass per token and has no cache between requests.
"""

import os

from guesses import make_guessing_possible

from support import (
    differences,
    engine,
    generate,
    oracle,
    preemptions,
    random_prompts,
    random_spec,
    slot,
    slot_specs,
    status,
    tight_engine,
)

TOKENS = 12
FADING = {"decay": 0.85}
HALF = [*range(4, 130)]  # ids: about every second token is one


def where_specs(word, other):
    """Specs of every kind of `where` that needs no tokenizer. `word` and `other` are ids that answers have."""
    thinking = {"name": "thinking", "start": [other], "end": [word]}
    one, two = added(31), added(32, layers=[1, 3], strength=2.0)
    places = [
        [one | {"where": {"prompt": [[-1, None]], "answer": "all"}, "schedule": FADING}],
        [one | {"where": {"answer": [[0, 3], [5, 6]]}}],
        [one | {"where": {"prompt": [[1, 4], [-3, -1]], "answer": [[2, None]], "not": {"answer": [[4, 5]]}}}, two],
        [one | {"where": {"tokens": HALF}}],
        [
            one | {"where": {"after": [word]}},
            two | {"where": {"until": [word], "answer": [[1, None]]}, "schedule": {"ramp": [0, 4]}},
        ],
        [one | {"where": {"section": thinking}}, two | {"where": {"section": {**thinking, "name": "response"}}}],
        [one | {"where": {"after": [other], "until": [word], "tokens": HALF}}, two | {"phase": "prefill"}],
    ]
    return [{"interventions": steps} for steps in places]


def added(seed, **options):
    """An intervention that adds and says nothing of where."""
    step = random_spec(seed, **options)["interventions"][0]
    return {key: value for key, value in step.items() if key != "phase"}


def slots_where(word):
    """Specs of kinds that do more than add, and of gates, that say where."""
    gated = slot_specs()[6]["interventions"][0]
    steps = [
        [
            slot("ablate", 41, strength=2.0)
            | {"where": {"prompt": [[-2, None]], "answer": [[0, 4]]}, "schedule": FADING}
        ],
        [slot("clamp", 42, [1, 2], value=7.0) | {"where": {"after": [word]}}, slot("scale", 43, factor=-4.0)],
        [
            gated | {"where": {"tokens": HALF}, "schedule": {"ramp": [1, 5]}},
            slot("clamp", 48, [1, 2], min=5.0) | {"phase": "decode"},
        ],
        [
            added(33) | {"schedule": FADING},
            added(34) | {"where": {"answer": [[2, 9]]}, "schedule": {"decay": 0.7}},
            added(35),
        ],
    ]
    return [{"interventions": some} for some in steps]


def mixed_specs(model, prompts, others):
    """One spec for each prompt: two of three have places, by words of the answer that it has when it is not steered."""
    plain = oracle(model, prompts, [None] * len(prompts), TOKENS)
    places = [[*where_specs(answer[2], answer[5]), *slots_where(answer[2])] for answer in plain]
    return [own[index % len(own)] if index % 3 else others[index % len(others)] for index, own in enumerate(places)]


def alone(llm, model, requests, monitor=None):
    """A batch of them, in an engine whose monitor this is."""
    prompts = random_prompts([4 + (5 * i) % 37 for i in range(requests)], seed=6)
    plain = oracle(model, prompts, [None] * requests)
    specs = [where_specs(answer[1], answer[3])[i % 7] for i, answer in enumerate(plain)]
    return {"where": differences(generate(llm, prompts, specs), oracle(model, prompts, specs, monitor=monitor))}


def placed(llm, model, prompts, specs):
    """A batch of requests with places and without; then again, prompts in the cache; then their answers sent again."""
    expected = oracle(model, prompts, specs, TOKENS)
    turns = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    plain = oracle(model, prompts, [None] * len(prompts), TOKENS)
    return {
        "where differ": sum(e != p for e, p in zip(expected, plain, strict=True)),
        "where": differences(generate(llm, prompts, specs, TOKENS), expected),
        "where again": differences(generate(llm, prompts, specs, TOKENS), expected),
        "where turns": differences(generate(llm, turns, specs, 4), oracle(model, turns, specs, 4)),
    }


def preempted(folder, model, settings):
    """A batch of them that the KV cache has no room for: they are thrown out and find their answers in the cache."""
    prompts = random_prompts([60 + i for i in range(8)], seed=7)
    plain = oracle(model, prompts, [None] * 8, 40)
    specs = [where_specs(answer[9], answer[20])[i % 7] for i, answer in enumerate(plain)]
    llm = tight_engine(folder, steering=settings)
    found = generate(llm, prompts, specs, 40)
    return {
        "where preempted": differences(found, oracle(model, prompts, specs, 40)),
        "where preemptions": preemptions(llm),
    }


def thrown_out(llm, model):
    """Requests that are all thrown out again and again, and find most of their answers in the prefix cache."""
    prompts = random_prompts([20 + i for i in range(7)], seed=10)
    plain = oracle(model, prompts, [None] * 7, 70)
    specs = [where_specs(answer[5], answer[9])[i] for i, answer in enumerate(plain)]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    schedule, forget, steps, hits = scheduler.schedule, scheduler.kv_cache_manager.reset_prefix_cache, [], []

    def throwing_out(*args, **kwargs):
        steps.append(None)
        if thrown := len(steps) % 19 == 0:
            scheduler.kv_cache_manager.reset_prefix_cache = lambda: True  # what was computed is kept
            scheduler.reset_prefix_cache(reset_running_requests=True)
            scheduler.kv_cache_manager.reset_prefix_cache = forget
        output = schedule(*args, **kwargs)
        if thrown:
            hits.extend(_computed(output))
        return output

    scheduler.schedule = throwing_out
    try:
        found = generate(llm, prompts, specs, 70)
    finally:
        scheduler.schedule = schedule
    return {"where thrown out": differences(found, oracle(model, prompts, specs, 70)), "hits": hits}


def _computed(output):
    """How many tokens of each request that comes back, or comes as new, were found."""
    cached = output.scheduled_cached_reqs
    again = [
        n for name, n in zip(cached.req_ids, cached.num_computed_tokens, strict=True) if name in cached.resumed_req_ids
    ]
    return again + [new.num_computed_tokens for new in output.scheduled_new_reqs]


def guessed(folder, model, settings):
    """Answers that an n-gram speculator guesses at, several tokens a step.

    V2's guesses on the device, with asynchronous scheduling: the host does not know which were right, hence where a
    step begins, when it plans. V1's does so with CUDA alone.
    """
    behind = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    prompts = [prompt * 3 for prompt in random_prompts([9 + i for i in range(14)], seed=8)]
    plain = oracle(model, prompts, [None] * 14, 24)
    specs = [where_specs(answer[4], answer[9])[i % 7] for i, answer in enumerate(plain)]
    guesses = {
        "method": "ngram_gpu" if behind else "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    make_guessing_possible()
    llm = engine(
        folder, steering=settings, speculative_config=guesses, async_scheduling=behind, disable_log_stats=False
    )
    found = generate(llm, prompts, specs, 24)
    counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {
        "where guessed": differences(found, oracle(model, prompts, specs, 24)),
        "drafts": counts["vllm:spec_decode_num_draft_tokens"],
        "accepted drafts": counts["vllm:spec_decode_num_accepted_tokens"],
        "after guesses": status(llm),
    }
