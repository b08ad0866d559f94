"""How many tokens of an output were steered, and what its gates and slots did: one rule for both engines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from trimtab.program import ResolvedSteering
from trimtab.sites import Phase

MOST_LABELS = 4096  # names in totals: any number of them can be registered, one after the other

# Labels of totals for all that has none of its own. No name that can be registered has parentheses.
INLINE, OTHERS = "(inline)", "(others)"


def received(
    steering: ResolvedSteering, prompt_length: int, new_tokens: int, tokens: Sequence[int] | None = None
) -> list[int]:
    """How many positions of one output received each of `steering.programs`.

    Those are the first `prompt_length` of its prompt, whose KV may have come from a cache: they were steered when it
    was made. Of `new_tokens` all count but the last: that one was decided and never fed back, so nothing of it was
    computed. Each position counts once, however often an engine computed it.

    Where the answer's tokens decide, `tokens` are the ids of the whole prompt and of the answer. Raises ValueError
    where they are needed and missing.
    """
    fed = max(new_tokens - 1, 0)
    if (spans := steering.spans) is None:
        return [prompt_length, fed]
    counts = [0] * len(steering.programs)
    end = spans.prompt_length + fed
    runs = [*spans.runs(end)]
    if any(len(choice) > 1 for _, _, choice in runs):
        if tokens is None or len(tokens) < end:
            raise ValueError(f"tokens of an answer of {new_tokens} decide what they receive, and are not given")
        found = np.bincount(spans.decided(tokens[:end], first=spans.prompt_length), minlength=len(counts))
        counts = found.tolist()
        end = spans.prompt_length
    for start, stop, choice in runs:
        stop = min(stop, prompt_length if start < spans.prompt_length else end)
        counts[choice[0]] += max(0, stop - start)
    return counts


def steered_tokens(
    steering: ResolvedSteering | None, prompt_length: int, new_tokens: int, tokens: Sequence[int] | None = None
) -> dict[Phase, int]:
    """Positions of one output that were steered, per phase, counted as `received` counts them."""
    steered = dict.fromkeys(Phase, 0)
    if steering is not None:
        counts = received(steering, prompt_length, new_tokens, tokens)
        for phase, program, count in zip(steering.phases, steering.programs, counts, strict=True):
            steered[phase] += count if program.identity else 0
    return steered


GateKey = tuple[str, bool, str]


@dataclass(frozen=True)
class GateUse:
    """What one gate did. `tokens` counts evaluations: a token computed twice, after a preemption, counts twice, and one
    found in a prefix cache not at all."""

    probe: str  # its registered name, or the first digits of its direction's digest; (all), (any); in totals the label
    gate: str  # hex digest of the gate; "" in a sum over all gates of a probe
    tokens: int
    mean: float  # of the factor; 0 without tokens
    above_half: int  # tokens whose factor exceeded one half
    lowered: int = 0  # times that a request had it as a probe of its row: new tokens are then not counted
    within: str = ""  # hex digest of the gate of several whose member it is; the factor is then its own, by itself

    @property
    def key(self) -> GateKey:
        """By what uses of one gate are found. A gate of several comes before its members."""
        return self.within or self.gate, bool(self.within), self.gate

    def __add__(self, other: "GateUse") -> "GateUse":
        tokens = self.tokens + other.tokens
        mean = (self.mean * self.tokens + other.mean * other.tokens) / tokens if tokens else 0.0
        above_half, lowered = self.above_half + other.above_half, self.lowered + other.lowered
        return GateUse(self.probe, self.gate, tokens, mean, above_half, lowered, self.within)


@dataclass(frozen=True)
class SlotUse:
    """What one slot did in one phase, at the sites of one rank: c of every token at each of its sites, which is what
    its response says times its gate. Tokens are counted as `GateUse` counts them."""

    phase: str
    slot: str  # hex digest
    begins: str  # the first of these sites
    measured: int  # numbers c: tokens times sites
    total: float  # sum of |c|
    moved: int  # how many were not 0

    @property
    def key(self) -> tuple[str, str, str]:
        """By what uses of one slot at the same sites are found."""
        return self.phase, self.slot, self.begins

    def __add__(self, other: "SlotUse") -> "SlotUse":
        measured, moved = self.measured + other.measured, self.moved + other.moved
        return SlotUse(self.phase, self.slot, self.begins, measured, self.total + other.total, moved)


class _Use(Protocol):
    @property
    def key(self) -> Any: ...

    def __add__(self, other: Self, /) -> Self: ...


Use = TypeVar("Use", bound=_Use)


def summed(uses: Iterable[Use]) -> list[Use]:
    """One for each key, in the order of keys: what several rows, passes or engines did, added up."""
    total: dict[Any, Use] = {}
    for use in uses:
        total[use.key] = total[use.key] + use if use.key in total else use
    return [total[key] for key in sorted(total)]
