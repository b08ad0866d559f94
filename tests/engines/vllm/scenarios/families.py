"""Every convention of vLLM's decoder layers, at every hook point that its class has. Arguments: mode, families."""

import sys

from support import (
    differences,
    engine,
    generate,
    oracle,
    random_prompts,
    random_spec,
    report,
    slot,
    tiny_model,
    unmeasured,
)

ALL = ("pre_attn", "attn_out", "post_attn", "mlp_in", "mlp_out", "post_block")
OUTER = ("pre_attn", "post_block")
HOOKS = {"cohere": OUTER, "opt": OUTER, "falcon": OUTER, "transformers": OUTER}

# One that begins, one in the middle and one before the last norm. Traced, each layer takes 2 s of CPU: there the one in
# the middle is left out, which takes in what the last does, and hands on what the first does.
LAYERS = {"eager": 3, "traced": 2}


def main(mode: str, families: list[str]) -> None:
    outcome = {}
    for family in families:
        outcome[family] = _family(family, mode)
        _forget_engine()
    report(outcome)


def _family(family: str, mode: str) -> dict[str, object]:
    count = LAYERS[mode]
    backend = {"model_impl": "transformers"} if family == "transformers" else {}
    folder, model = tiny_model("llama" if family == "transformers" else family, layers=count)
    hooks = HOOKS.get(family, ALL)
    # One request per hook point in each layer, and one that uses them all.
    specs = [random_spec(40 + i, layers=[i % count], hooks=[hook], strength=2.0) for i, hook in enumerate(hooks)]
    specs += [random_spec(60 + i, layers=[(i - 1) % count], hooks=[hook], strength=2.0) for i, hook in enumerate(hooks)]
    specs += [{"interventions": [slot("clamp", 70 + i, [i % count], [hook], value=5.0 * (-1) ** i)]}
              for i, hook in enumerate(hooks)]  # fmt: skip
    every = {"layers": range(count), "hooks": hooks}
    specs += [random_spec(80, **every), random_spec(81, **every, phase="decode"), None]
    prompts = random_prompts([11 + 3 * (i % 7) for i in range(len(specs))], seed=9)
    # The oracle first: vLLM's Transformers backend decorates the class of the model for the whole process.
    expected, plain = oracle(model, prompts, specs), oracle(model, prompts, [None] * len(specs))
    unmeasured.clear()
    llm = engine(
        folder,
        steering={"hook_points": list(hooks), "slots": 1, "slot_layers": list(range(count))},
        mode=mode,
        **backend,
    )
    return {
        "unmeasured": list(unmeasured),
        "layer": type(_layer(llm)).__mro__[2].__name__,
        "steered differently": sum(e != p for e, p in zip(expected, plain, strict=True)),
        "specs": len(specs),
        "differences": differences(generate(llm, prompts, specs), expected),
    }


def _forget_engine():
    """Mixtures of experts need process groups that other engines do not make."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _layer(llm):
    from trimtab.sites import HookPoint, Site

    (layer,) = llm.collective_rpc(lambda worker: worker._trimtab.attachment.modules[Site(0, HookPoint.POST_BLOCK)])
    return layer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","))
