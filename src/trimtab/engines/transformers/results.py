"""What a steered generation returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from trimtab.counting import steered_tokens
from trimtab.program import ResolvedSteering
from trimtab.runtime import GateUse
from trimtab.sites import Phase, Site


@dataclass(frozen=True)
class Receipt:
    """What was done to one output. An unsteered one has empty identities, no sites and zero tokens.

    `steered_tokens` counts by position: every prompt token where the prefill was steered, and every new token but the
    last where the decode was: the last one is never fed back, so nothing of it was computed. `gates` says what each
    gate did on those tokens; with beam search, on those of all beams of the prompt. `monitor` is the digest of the
    monitor that stood before what the decode received, "" where none did.
    """

    identity: Mapping[Phase, str]
    sites: tuple[Site, ...]
    steered_tokens: Mapping[Phase, int]
    gates: tuple[GateUse, ...] = ()
    monitor: str = ""


@dataclass(frozen=True)
class Generation:
    """One output. `token_ids` are the new tokens alone, up to and including the end token, without padding; `text` is
    what the tokenizer makes of them, special tokens left out ("" without a tokenizer)."""

    text: str
    token_ids: list[int]
    receipt: Receipt


def receipt(
    steering: ResolvedSteering | None, prompt_length: int, new_tokens: int, gates: tuple[GateUse, ...] = ()
) -> Receipt:
    """The receipt of an output of `new_tokens` tokens after a prompt of `prompt_length`."""
    identity = {phase: "" if steering is None else steering.identity(phase) for phase in Phase}
    counts = steered_tokens(steering, prompt_length, new_tokens)
    sites = () if steering is None else steering.sites
    monitor = steering.monitor if steering is not None and steering.monitored else ""
    return Receipt(MappingProxyType(identity), sites, MappingProxyType(counts), gates, monitor)


def new_tokens(row: Sequence[int], end_tokens: frozenset[int], strip: int | None = None) -> list[int]:
    """The tokens of `row` up to and including the first end token; without one, trailing `strip` tokens are cut."""
    for index, token in enumerate(row):
        if token in end_tokens:
            return list(row[: index + 1])
    end = len(row)
    while strip is not None and end and row[end - 1] == strip:
        end -= 1
    return list(row[:end])
