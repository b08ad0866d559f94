"""One engine on a compile cache that other configurations use too.

Argument: "stock", or steering settings as JSON, or "stale": a steered engine whose key is that of the stock one.
"""

import json
import os
import sys
from pathlib import Path

from support import differences, engine, generate, oracle, random_prompts, random_spec, report, slot, tiny_model


def main(settings: str) -> None:
    # One folder for all runs: its name is part of the key of what vLLM stores. One layer, since each takes seconds.
    folder, model = tiny_model(parent=Path(os.environ["VLLM_CACHE_ROOT"]), layers=1)
    if settings == "stale":
        report({"refused": _start_with_the_stock_key(folder)})
        return
    steering = None if settings == "stock" else json.loads(settings)
    specs = [None] * 4 if steering is None else [random_spec(i, layers=[0], strength=2.0) for i in range(3)] + [None]
    if steering and steering.get("slots"):  # one beside what is added, one alone
        specs[0]["interventions"].append(slot("clamp", 5, [0], value=9.0))
        specs[1] = {"interventions": [slot("ablate", 6, [0], strength=2.0)]}
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


def _start_with_the_stock_key(folder: str) -> str:
    from vllm.config import VllmConfig

    original = VllmConfig.compute_hash

    def compute_hash(self):
        config, self.additional_config = self.additional_config, {}
        try:
            return original(self)
        finally:
            self.additional_config = config

    VllmConfig.compute_hash = compute_hash
    try:
        engine(folder, steering={}, mode="compiled")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "started"


if __name__ == "__main__":
    main(sys.argv[1])
