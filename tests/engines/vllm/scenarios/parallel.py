"""Tensor or pipeline parallelism, worker processes of their own. Arguments: "tp" or "pp"."""

import sys

from support import (
    differences,
    eight_specs,
    engine,
    generate,
    oracle,
    random_prompts,
    random_spec,
    report,
    status,
    tiny_model,
)

HOOKS = ("pre_attn", "post_attn", "mlp_in", "mlp_out", "post_block")


def main(kind: str) -> None:
    folder, model = tiny_model()
    specs = [*eight_specs(), *(random_spec(90 + i, hooks=[hook]) for i, hook in enumerate(HOOKS))] * 3
    prompts = random_prompts([4 + (5 * i) % 37 for i in range(len(specs))])
    expected = oracle(model, prompts, specs)
    sizes = {"tp": {"tensor_parallel_size": 2}, "pp": {"pipeline_parallel_size": 2, "async_scheduling": False}}[kind]
    settings = {"hook_points": list(HOOKS)}
    llm = engine(folder, steering=settings, distributed_executor_backend="mp", max_num_batched_tokens=64, **sizes)
    found = generate(llm, prompts, specs)
    report(
        {
            "differences": differences(found, expected),
            "again": differences(generate(llm, prompts, specs), expected),
            "status": status(llm),
        }
    )


if __name__ == "__main__":
    main(sys.argv[1])
