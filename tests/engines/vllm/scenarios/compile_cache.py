"""One engine on a compile cache that other configurations use too. Arguments: "stock", or steering settings as JSON."""

import json
import os
import sys
from pathlib import Path

from support import differences, engine, generate, oracle, random_prompts, random_spec, report, tiny_model


def main(settings: str) -> None:
    # One folder for all runs: its name is part of the key of what vLLM stores.
    folder, model = tiny_model(parent=Path(os.environ["VLLM_CACHE_ROOT"]))
    steering = None if settings == "stock" else json.loads(settings)
    layers = range(4) if not steering else [0, 1]
    specs = [None] * 4 if steering is None else [random_spec(i, layers=layers, strength=2.0) for i in range(3)] + [None]
    prompts = random_prompts([9, 20, 33, 15])
    expected = oracle(model, prompts, specs)
    plain = oracle(model, prompts, [None] * 4)
    llm = engine(folder, steering=steering, mode="compiled")
    report(
        {
            "differences": differences(generate(llm, prompts, specs), expected),
            "steered differently": sum(e != p for e, p in zip(expected, plain, strict=True)),
            "attached": hasattr(llm.llm_engine.model_executor.driver_worker.worker, "_trimtab"),
        }
    )


if __name__ == "__main__":
    main(sys.argv[1])
