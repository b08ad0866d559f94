"""What steered requests share in the prefix cache, and that sharing never changes an answer."""

from support import differences, engine, generate, random_prompts, random_spec, report, tiny_model

LENGTH, BLOCK, FULL = 100, 32, 96  # prompt tokens; block size; prompt tokens in full blocks
SHORT = 10  # prompt tokens of a chat whose first block its answer fills
EVERY, OTHER = random_spec(1, strength=2.0), random_spec(2, strength=2.0)
PREFILL, DECODE = random_spec(3, phase="prefill", strength=2.0), random_spec(4, phase="decode", strength=2.0)


def main() -> None:
    folder, _ = tiny_model()
    with_cache = Asker(engine(folder, steering={}, enable_prefix_caching=True))
    without = engine(folder, steering={}, enable_prefix_caching=False)
    fresh = iter(random_prompts([LENGTH] * 20, seed=1))

    cached = {}
    prompt = next(fresh)
    with_cache.ask(prompt, EVERY)
    cached["equal specs"] = with_cache.ask(prompt, EVERY)
    cached["same content, scaled"] = with_cache.ask(prompt, _scaled(EVERY, 0.5))
    cached["another prefill spec"] = with_cache.ask(prompt, OTHER)
    cached["unsteered after steered"] = with_cache.ask(prompt, None)
    cached["steered after unsteered"] = with_cache.ask(prompt, PREFILL)

    prompt = next(fresh)
    with_cache.ask(prompt, None)
    cached["decode-only after unsteered"] = with_cache.ask(prompt, DECODE)
    prompt = next(fresh)
    with_cache.ask(prompt, DECODE)
    cached["unsteered after decode-only"] = with_cache.ask(prompt, None)
    cached["another decode-only spec"] = with_cache.ask(prompt, _scaled(DECODE, -1.0))

    for name, spec in (("decode-only", DECODE), ("prefill-only", PREFILL), ("both phases", EVERY), ("no", None)):
        prompt = next(fresh)
        with_cache.ask(prompt, spec, 70)
        turn = prompt + with_cache.answers[-1]
        cached[f"a turn after an answer with {name} steering"] = with_cache.ask(turn, spec)
        cached[f"its answer sent unsteered, {name}"] = with_cache.ask(turn, None)

    chat = random_prompts([SHORT], seed=2)[0]
    with_cache.ask(chat, EVERY, 40)
    chat = chat + with_cache.answers[-1]
    cached["a short chat's turn, sent unsteered"] = with_cache.ask(chat, None)
    cached["a short chat's turn"] = with_cache.ask(chat, EVERY)

    for name, spec in (("decode-only", DECODE), ("prefill-only", PREFILL)):
        prompt = next(fresh)
        with_cache.ask(prompt, spec, 40)
        longer = prompt + with_cache.answers[-1][:20]
        cached[f"another prompt length, {name}"] = with_cache.ask(longer, spec, 40)

    report(
        {
            "cached": cached,
            "differences": differences(with_cache.answers, generate(without, *zip(*with_cache.asked, strict=True))),
            "stock keys": _stock_keys(),
            "requests": len(with_cache.asked),
        }
    )


class Asker:
    """Asks one request at a time and keeps what was asked and answered."""

    def __init__(self, llm):
        self.llm, self.asked, self.answers = llm, [], []

    def ask(self, prompt, spec, tokens=8):
        """How many tokens of the prompt were found in the cache."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args=None if spec is None else {"steering": spec},
        )  # fmt: skip
        (output,) = self.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        self.asked.append((prompt, spec, tokens))
        self.answers.append(list(output.outputs[0].token_ids))
        return output.num_cached_tokens


def _scaled(spec, factor):
    (only,) = spec["interventions"]
    return {"interventions": [{**only, "scale": factor * only["scale"]}]}


def _stock_keys():
    """Hashes of an unsteered request's blocks: with our patch, and with vLLM's own function in its place."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.request import Request

    def hashes():
        hasher = kv_cache_utils.get_request_block_hasher(BLOCK, sha256_cbor)
        params = SamplingParams(max_tokens=4)
        request = Request(
            request_id="r", prompt_token_ids=list(range(200)), sampling_params=params, pooling_params=None,
            block_hasher=hasher, cache_salt="salt",
        )  # fmt: skip
        return [value.hex() for value in request.block_hashes]

    ours = hashes()
    patched = kv_cache_utils.generate_block_hash_extra_keys
    kv_cache_utils.generate_block_hash_extra_keys = patched.__wrapped__
    try:
        return {"ours": ours, "stock": hashes()}
    finally:
        kv_cache_utils.generate_block_hash_extra_keys = patched


if __name__ == "__main__":
    main()
