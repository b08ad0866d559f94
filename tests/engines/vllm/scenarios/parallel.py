"""Tensor or pipeline parallelism, worker processes of their own, twelve rows. Arguments: "tp" or "pp", requests."""

import sys

import where

from support import (
    HOOKS,
    SLOTS,
    corrections,
    differences,
    eight_specs,
    engine,
    generate,
    oracle,
    random_prompts,
    random_spec,
    report,
    slot_specs,
    status,
    tiny_model,
    two_ranks,
)


def parallel(kind: str, requests: int, mode: str = "eager") -> None:
    folder, model = tiny_model()
    kinds = [*eight_specs(), *(random_spec(90 + i, hooks=[hook]) for i, hook in enumerate(HOOKS))]
    kinds += [slot_specs()[i] for i in (0, 1, 3, 4, 7, 8, 11)]
    specs = [kinds[i % len(kinds)] for i in range(requests)]
    prompts = random_prompts([4 + (5 * i) % 37 for i in range(requests)])
    expected = oracle(model, prompts, specs)
    llm = engine(
        folder, steering=SLOTS | {"max_rows": 13}, mode=mode, max_num_batched_tokens=64,
        **two_ranks(kind),
    )  # fmt: skip
    report(
        {
            "mixed": differences(generate(llm, prompts, specs), expected),
            "again": differences(generate(llm, prompts, specs), expected),
            "status": status(llm),
            "corrections": corrections(llm, model, random_prompts([9, 5, 14, 6], 9), kinds[-4:], 4),
            **where.alone(llm, model, 7),
        }
    )


if __name__ == "__main__":
    parallel(sys.argv[1], int(sys.argv[2]))
