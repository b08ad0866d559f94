"""Tables of eight rows: many requests wait for them, in order, and none of them loses what it holds.

Arguments: "eager", and a number of requests. The engine core runs in this process, so that what its scheduler decides
can be recorded.
"""

import sys

import numpy as np

from support import (
    HIDDEN,
    differences,
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
)
from trimtab.errors import SteeringError

VECTORS = 40
SETTINGS = {"max_rows": 9, "gates": 4, "probe_layers": [0]}


def main(requests):
    folder, model = tiny_model()
    specs = [mixed(number % VECTORS) if number % 4 else None for number in range(requests)]
    prompts = random_prompts([2 + i % 5 for i in range(requests)], seed=2)
    expected = oracle(model, prompts, specs, 2, batch=50)
    llm = engine(folder, steering=SETTINGS, max_num_seqs=128, max_num_batched_tokens=2048, enable_prefix_caching=True)
    steps, asked = recorded(core_of(llm)), questions(core_of(llm))
    found = generate(llm, prompts, specs, 2)
    outcome = {
        "differences": differences(found, expected),
        "steps": [[numbers(step["starts"]), step["reserved"], step["waiting"]] for step in steps],
        "asked": len(asked),
        "refused": refused(llm, prompts[0]),
        "goes on": differences(generate(llm, prompts[:1], [many(8)], 2), oracle(model, prompts[:1], [many(8)], 2)),
        "aborts": aborts(llm),
        "status": status(llm),
    }
    report(outcome | preempted(folder, model))


def mixed(number):
    """One vector in one phase or both, two of them, or one behind a gate."""
    layers = [1 + number % 3]
    if number % 5 == 0:
        halves = [random_spec(s + number, layers=layers, phase=p) for s, p in ((500, "prefill"), (600, "decode"))]
        return {"interventions": [step for half in halves for step in half["interventions"]]}
    spec = random_spec(1000 + number, layers=layers, phase=("all", "prefill", "decode")[number % 3])
    if number % 5 == 1:
        spec["interventions"][0]["gate"] = gate(number)
    return spec


def gate(seed, threshold=0.0):
    direction = np.random.default_rng(100 + seed).standard_normal(HIDDEN).round(4).tolist()
    return {"probe": {"post_block": {"0": direction}}, "threshold": threshold, "sharpness": 0.3}


def many(rows):
    """A request that needs so many rows: one and four gated ones in each phase, as far as they go."""
    steps = []
    for number in range(rows):
        place, phase = number % 5, ("prefill", "decode")[number // 5]
        (step,) = random_spec(2000 + number, layers=[1], phase=phase, strength=0.3)["interventions"]
        steps.append({**step, "gate": gate(7, place / 4)} if place else step)
    return {"interventions": steps}


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def recorded(core):
    """What the scheduler starts in each step, and what its pool says then."""
    steps, seen, schedule = [], set(), core.scheduler.schedule

    def recording(*args, **kwargs):
        output = schedule(*args, **kwargs)
        new = [request.req_id for request in output.scheduled_new_reqs if request.req_id not in seen]
        seen.update(new)
        pool = core._trimtab_rows.pool
        steps.append({"starts": new, "reserved": pool.reserved, "waiting": pool.waiting})
        return output

    core.scheduler.schedule = recording
    return steps


def questions(core):
    """Whom the scheduler asks whether it may run, once for each time."""
    asked, may_run = [], core._trimtab_rows.may_run

    def asking(request):
        asked.append(request.request_id)
        return may_run(request)

    core._trimtab_rows.may_run = asking
    return asked


def numbers(request_ids):
    """vLLM counts the requests of one call, and puts something random behind."""
    return [int(request_id.split("-")[0]) for request_id in request_ids]


def refused(llm, prompt):
    try:
        generate(llm, [prompt], [many(9)], 2)
    except SteeringError as error:
        return [error.field, error.message]
    return "answered"


def aborts(llm):
    """One request that holds all rows, and two that wait for them: one of those is aborted, then the first."""
    from vllm import SamplingParams

    def add(name, spec, tokens):
        extra = {"steering": spec}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
        llm.llm_engine.add_request(name, {"prompt_token_ids": [5, 6, 7]}, params)

    core, told = core_of(llm), []
    pool = core._trimtab_rows.pool

    def tell():
        told.append([pool.reserved, pool.waiting, core.scheduler.get_num_unfinished_requests()])

    add("holds", many(8), 300)
    add("waits", random_spec(3, layers=[2]), 2)
    add("waits too", random_spec(4, layers=[2]), 2)
    for _ in range(4):
        llm.llm_engine.step()
    tell()
    llm.llm_engine.abort_request(["waits"])
    llm.llm_engine.step()
    tell()
    llm.llm_engine.abort_request(["holds"])
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [output for output in llm.llm_engine.step() if output.finished]
    tell()
    return {"told": told, "finished": [[output.request_id, len(output.outputs[0].token_ids)] for output in finished]}


def preempted(folder, model):
    """Requests of four priorities in an engine whose cache is too small for them, with six rows."""
    count, tokens = 12, 60
    specs = [random_spec(3000 + number, layers=[1, 2]) for number in range(count)]
    prompts = random_prompts([40] * count, seed=5)
    priorities = [(5 * number) % 4 for number in range(count)]
    llm = tight_engine(folder, steering={"max_rows": 7}, scheduling_policy="priority")
    core = core_of(llm)
    steps, kept, thrown_out = recorded(core), [], set()
    preempt, schedule = core.scheduler._preempt_request, core.scheduler.schedule

    def preempting(request, *args, **kwargs):
        thrown_out.add(request.request_id)
        return preempt(request, *args, **kwargs)

    def scheduling(*args, **kwargs):
        output = schedule(*args, **kwargs)
        alive = thrown_out & core.scheduler.requests.keys()
        pool = core._trimtab_rows.pool
        kept.extend(request_id in pool and pool.may_run(request_id) for request_id in alive)
        return output

    core.scheduler._preempt_request, core.scheduler.schedule = preempting, scheduling
    found = generate(llm, prompts, specs, tokens, priority=priorities)
    order = sorted(range(count), key=lambda number: (priorities[number], number))
    return {
        "preemptions": preemptions(llm),
        "kept": [len(kept), all(kept)],
        "tight": differences(found, oracle(model, prompts, specs, tokens)),
        "most reserved": max(step["reserved"] for step in steps),
        "started": numbers(name for step in steps for name in step["starts"]),
        "due": order,
        "left": [core._trimtab_rows.pool.reserved, core._trimtab_rows.pool.waiting],
    }


if __name__ == "__main__":
    main(int(sys.argv[2]))
