"""Prefix-cache keys of steered requests.

vLLM finds cached KV by a chain of block hashes over token ids and extra keys. Steered KV depends on more: on what was
added to the tokens before, and on which of them counted as prompt. The keys say exactly that and no more:

- the first block carries the prefill identity, if the prompt is steered; all later hashes follow from it;
- where decode tokens are steered differently, every block that reaches beyond the prompt carries the decode identity
  and where the prompt ends in it.

So equal specs share prompt blocks, decode-only steering shares them with unsteered traffic, a steered answer that is
sent again as a prompt is computed anew, and so are the same tokens with another prompt length. A request whose phases
are steered alike has no boundary, and its answer's blocks are found again by the next turn. Unsteered keys are vLLM's.
An engine's monitor acts on decode tokens alone and is in their identity, so behind it no request is steered alike.
"""

from typing import Any

from trimtab.engines.vllm.wire import Wire, carried
from trimtab.sites import Phase


def steering_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Extra keys of the block that holds tokens `start` to `end` (exclusive) of a vLLM `Request`.

    Pairs of a tag and a value, as vLLM's own extra keys are from 0.32 on.
    """
    wire = carried(request.sampling_params)
    if not isinstance(wire, Wire):  # an engine that is not steered leaves what others put there alone
        return ()
    prefill, decode = wire.steering.identity(Phase.PREFILL), wire.steering.identity(Phase.DECODE)
    prompt = request.num_prompt_tokens
    keys: list[tuple[str, str]] = []
    if start == 0 and prefill:
        keys.append(("trimtab_prefill", prefill))
    if prefill != decode and end > prompt:
        keys.append(("trimtab_decode", f"{decode or '-'}@{max(0, prompt - start)}"))
    return tuple(keys)
