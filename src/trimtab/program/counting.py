"""How many tokens of an output were steered: one rule for both engines."""

from trimtab.program import ResolvedSteering
from trimtab.sites import Phase


def steered_tokens(steering: ResolvedSteering | None, prompt_length: int, new_tokens: int) -> dict[Phase, int]:
    """Positions of one output that were steered, per phase.

    Where the prefill is steered these are all `prompt_length` tokens of the prompt: those whose KV came from a cache
    were steered when it was made. Where the decode is, all of `new_tokens` but the last: that one was decided and never
    fed back, so nothing of it was computed. Each position counts once, however often an engine computed it.
    """
    fed = {Phase.PREFILL: prompt_length, Phase.DECODE: max(new_tokens - 1, 0)}
    return {phase: fed[phase] if steering is not None and steering.identity(phase) else 0 for phase in Phase}
