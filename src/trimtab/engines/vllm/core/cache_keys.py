"""Prefix-cache keys of steered requests.

vLLM finds cached KV by a chain of block hashes over token ids and extra keys. Steered KV depends on more: on what each
token before has received. The keys say exactly that and no more. A request's positions are runs, each with the name of
what its tokens receive (`trimtab.program.run_names`); unsteered ones are runs too, named "-", but for those at the
start. A block carries the name and the place of each run that begins in it, and all later hashes follow from those.

So equal specs share prompt blocks, steering of the answer shares them with unsteered traffic, a steered answer that is
sent again as a prompt is computed anew, and so are the same tokens with another prompt length. A request whose phases
are steered alike is one run, and its answer's blocks are found again by the next turn. Unsteered keys are vLLM's. An
engine's monitor is a gate of decode tokens alone, so a request that it acts on is not steered alike.

Where the answer's own tokens decide, the chain holds the tokens, and the name says the rest: how they decide, and where
the answer begins.

What has no keys would be shared with everyone, so nothing here is silent: a steered engine hashes no request whose
steering it has not read, and starts only if its own hasher is seen to ask for the keys.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.engines.vllm.carried import Carried, carried
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.errors import SteeringError
from trimtab.program import EMPTY, PhaseProgram, ResolvedSteering, Spans, Term
from trimtab.program.codec import KEYS, encode
from trimtab.program.run_names import plain_runs
from trimtab.sites import HookPoint, Phase, Site
from trimtab.vectors.vector import SteeringVector

Hasher = Callable[[Any], list[Any]]

TAG = "trimtab"


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
    steering: ResolvedSteering = given.steering
    if steering.spans is not None:
        runs = steering.runs
    else:
        prefill, decode = steering.programs
        runs = plain_runs(prefill.identity, decode.identity, request.num_prompt_tokens)
    first = bisect_left(runs, (start,))
    if first == len(runs) or runs[first][0] >= end:  # so it is for nearly every block
        return ()
    begun = runs[first : bisect_left(runs, (end,))]
    return tuple((TAG, f"{name}@{begin - start}") for begin, name in begun)


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
    """The canary: requests of which a part is steered, hashed by the engine's own hasher. From the block on in which
    that part begins, no hash is that of an unsteered request; those before all are."""
    tokens = 64
    while len(plain := _hashes(hasher, tokens)) < 4:  # two blocks of prompt, two of answer
        if (tokens := 2 * tokens) > 1 << 20:
            raise passed_by("makes no blocks of a prompt of a million tokens")
    half, quarter = tokens // 2, tokens // 4
    canary = PhaseProgram.of([Term(SteeringVector({Site(0, HookPoint.POST_BLOCK): [1.0]}), 1.0)])
    parts = [
        ("prompt", 0, ResolvedSteering((canary, EMPTY))),
        ("answer", half, ResolvedSteering((EMPTY, canary))),
        ("part of a prompt", quarter, _from(quarter, half, canary)),
        ("part of an answer", half + quarter, _from(half + quarter, half, canary)),
    ]
    for part, begin, steering in parts:
        steered = _hashes(hasher, tokens, steering)
        before, behind = (begin * count // tokens for count in (len(plain), len(plain) + 1))  # a block may be cut off
        if steered[:before] != plain[:before] or {*steered[behind:]} & {*plain[behind:]}:
            raise passed_by(f"gives blocks of a steered {part} the keys of an unsteered one")


def _from(begin: int, prompt: int, program: PhaseProgram) -> ResolvedSteering:
    """Steering of the tokens from `begin` to the end of the prompt, or of the answer."""
    starts = sorted({0, begin, prompt})
    phases = tuple(Phase.PREFILL if start < prompt else Phase.DECODE for start in starts)
    spans = Spans(prompt, tuple(starts), (0, 1, 2), ((0,), (1,), (2,)), phases)
    return ResolvedSteering(tuple(program if start == begin else EMPTY for start in starts), spans=spans)


def _hashes(hasher: Hasher, tokens: int, steering: ResolvedSteering | None = None) -> list[Any]:
    """Hashes of a prompt of half of `tokens` and an answer of as many."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=tokens)
    if steering is not None:
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
