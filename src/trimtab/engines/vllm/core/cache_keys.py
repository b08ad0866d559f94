"""Prefix-cache keys of steered requests.

vLLM finds cached KV by a chain of block hashes over token ids and extra keys. Steered KV depends on more: on what was
added to the tokens before, and on which of them counted as prompt. The keys say exactly that and no more:

- the first block carries the prefill identity, if the prompt is steered; all later hashes follow from it;
- where decode tokens are steered differently, every block that reaches beyond the prompt carries the decode identity
  and where the prompt ends in it.

So equal specs share prompt blocks, decode-only steering shares them with unsteered traffic, a steered answer that is
sent again as a prompt is computed anew, and so are the same tokens with another prompt length. A request whose phases
are steered alike has no boundary, and its answer's blocks are found again by the next turn. Unsteered keys are vLLM's.
An engine's monitor is a gate of decode tokens alone, so a request that it acts on is not steered alike.

What has no keys would be shared with everyone, so nothing here is silent: a steered engine hashes no request whose
steering it has not read, and starts only if its own hasher is seen to ask for the keys.
"""

from collections.abc import Callable, Mapping
from typing import Any

from trimtab.engines.vllm.carried import Carried, carried
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.errors import SteeringError
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.codec import KEYS, encode
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors.vector import SteeringVector

Hasher = Callable[[Any], list[Any]]


def steering_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Extra keys of the block that holds tokens `start` to `end` (exclusive) of a vLLM `Request`.

    Pairs of a tag and a value, as vLLM's own extra keys are from 0.32 on. Raises `SteeringError` for steering that no
    engine core has read.
    """
    given = carried(request.sampling_params)
    if not isinstance(given, Carried):
        if isinstance(given, Mapping) and (set(given) == KEYS or "interventions" in given):
            raise _unread(request)
        return ()  # an engine that is not steered leaves what others put there alone
    prefill, decode = given.steering.identity(Phase.PREFILL), given.steering.identity(Phase.DECODE)
    prompt = request.num_prompt_tokens
    keys: list[tuple[str, str]] = []
    if start == 0 and prefill:
        keys.append(("trimtab_prefill", prefill))
    if prefill != decode and end > prompt:
        keys.append(("trimtab_decode", f"{decode or '-'}@{max(0, prompt - start)}"))
    return tuple(keys)


def checked_hasher(hasher: Hasher) -> Hasher:
    """A steered engine core's block hasher, which from now on hashes no request whose steering it has not read.

    Raises `SteeringError` where it is seen to pass our keys by.
    """
    _require_keys(hasher)

    def hash_what_was_read(request: Any) -> list[Any]:
        given = carried(request.sampling_params)
        if given is not None and not isinstance(given, Carried):
            raise _unread(request)
        return hasher(request)

    return hash_what_was_read


def _unread(request: Any) -> SteeringError:
    return SteeringError(
        SETTINGS_KEY,
        f"request {getattr(request, 'request_id', '')!r} reached the scheduler with steering that the engine core has "
        "not read, so its KV could not be told from that of others: requests enter by `preprocess_add_request`",
    )


def _require_keys(hasher: Hasher) -> None:
    """The canary: blocks of prompts and of answers that are steered in one phase, hashed by the engine's own hasher."""
    tokens = 64
    while len(plain := _hashes(hasher, tokens, "", "")) < 4:  # two blocks of prompt, two of answer
        if (tokens := 2 * tokens) > 1 << 20:
            raise passed_by("makes no blocks of a prompt of a million tokens")
    half = len(plain) // 2
    prefill, decode = _hashes(hasher, tokens, "prefill", ""), _hashes(hasher, tokens, "", "decode")
    if len({*plain, *prefill}) != 2 * len(plain):
        raise passed_by("gives blocks of a steered prompt the keys of an unsteered one")
    if decode[: half - 1] != plain[: half - 1] or {*decode[half:]} & {*plain[half:]}:
        raise passed_by("gives blocks of a steered answer the keys of an unsteered one")


def _hashes(hasher: Hasher, tokens: int, prefill: str, decode: str) -> list[Any]:
    """Hashes of a prompt of half of `tokens` and an answer of as many, each steered with a canary of that name."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    def program(name: str) -> PhaseProgram:
        site = Site(0, HookPoint.POST_BLOCK)
        return PhaseProgram.of([Term(SteeringVector({site: [float(len(name))]}), 1.0)] if name else [])

    params = SamplingParams(max_tokens=tokens)
    if prefill or decode:
        steering = ResolvedSteering((program(prefill), program(decode)))
        params.extra_args = {SETTINGS_KEY: Carried(encode(steering), steering)}
    request = Request(
        request_id="trimtab-canary", prompt_token_ids=[1] * (tokens // 2), sampling_params=params, pooling_params=None,
        block_hasher=hasher,
    )  # fmt: skip
    request.append_output_token_ids([1] * (tokens - tokens // 2))
    return list(request.block_hashes)


def passed_by(fault: str) -> SteeringError:
    """The error of an engine core whose block hasher has a `fault`, as a predicate."""
    return SteeringError(
        SETTINGS_KEY,
        f"the block hasher of this engine {fault}, so answers would come from KV that was steered otherwise, and it "
        "does not start. This is a fault of trimtab with this version of vLLM; please report it, or set "
        "enable_prefix_caching to false",
    )
