"""A front end whose configuration was made, and pickled, in another process, as Ray Serve LLM's replicas get theirs.

It never loads plugins and makes no configuration of its own. With "travelling" it has the configuration as it was made;
with "plain" one that lost its type on the way, and so tells this process nothing about trimtab.
"""

import asyncio
import multiprocessing
import pickle
import sys
from pathlib import Path

from support import SCRATCH, differences, oracle, random_prompts, random_spec, report, tiny_model

TOKENS = 6


def make(kind: str, folder: str, file: str) -> None:
    """In the other process: a configuration, pickled."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs(
        model=folder, dtype="float32", enforce_eager=True, block_size=32, kv_cache_memory_bytes=64 << 20,
        max_model_len=128, max_num_seqs=8, skip_tokenizer_init=True, additional_config={"steering": {}},
    )  # fmt: skip
    config = args.create_engine_config()
    if kind == "plain":
        config.additional_config = dict(config.additional_config)
    Path(file).write_bytes(pickle.dumps(config))


async def serve(config, prompts, specs):
    """What a replica does: an engine client for the configuration, and sampling parameters made of request models."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    answers = []
    try:
        for number, (prompt, spec) in enumerate(zip(prompts, specs, strict=True)):
            body = {"model": "m", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            request = CompletionRequest(**body, **({} if spec is None else {"steering": spec}))
            try:
                params = request.to_sampling_params(TOKENS, {})
                params.detokenize = False
                async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id=str(number)):
                    last = output
                answer = last.outputs[0]
                answers.append("refused" if answer.finish_reason == "error" else list(answer.token_ids))
            except Exception as error:
                answers.append(f"{type(error).__name__}: {error}")
    finally:
        engine.shutdown()
    return answers


def main(kind: str) -> None:
    folder, model = tiny_model()
    file = SCRATCH / "config.pickle"
    maker = multiprocessing.get_context("fork").Process(target=make, args=(kind, folder, str(file)))
    maker.start()
    maker.join()
    config = pickle.loads(file.read_bytes())
    prompts, specs = random_prompts([5, 6, 7]), [None, random_spec(1), {"interventions": "none"}]
    answers = asyncio.run(serve(config, prompts, specs))
    good = slice(0, 2)
    expected = oracle(model, prompts[good], specs[good], TOKENS)
    plain = oracle(model, prompts[1:2], [None], TOKENS)
    report({"answers": answers, "differences": differences(answers[good], expected), "plain": plain})


if __name__ == "__main__":
    main(sys.argv[1])
