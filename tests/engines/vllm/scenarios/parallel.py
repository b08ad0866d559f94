"""Tensor or pipeline parallelism, worker processes of their own, eight rows. Arguments: "tp" or "pp", requests."""

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
    two_ranks,
)

HOOKS = ("pre_attn", "post_attn", "mlp_in", "mlp_out", "post_block")


def parallel(kind: str, requests: int, mode: str = "eager") -> None:
    folder, model = tiny_model()
    kinds = [*eight_specs(), *(random_spec(90 + i, hooks=[hook]) for i, hook in enumerate(HOOKS))]
    specs = [kinds[i % len(kinds)] for i in range(requests)]
    prompts = random_prompts([4 + (5 * i) % 37 for i in range(requests)])
    expected = oracle(model, prompts, specs)
    llm = engine(
        folder, steering={"hook_points": list(HOOKS), "max_rows": 9}, mode=mode, max_num_batched_tokens=64,
        **two_ranks(kind),
    )  # fmt: skip
    report(
        {
            "mixed": differences(generate(llm, prompts, specs), expected),
            "again": differences(generate(llm, prompts, specs), expected),
            "status": status(llm),
        }
    )


if __name__ == "__main__":
    parallel(sys.argv[1], int(sys.argv[2]))
