"""The receipt of an output: what was done to it. One type, one function and one JSON form, for every engine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from trimtab.program import Origin, ResolvedSteering
from trimtab.program.counting import GateUse, SlotUse, steered_tokens
from trimtab.program.monitor import monitor_of
from trimtab.serving.interventions import InterventionUse, uses_of
from trimtab.sites import Phase, Site

GATES_MISSING = "the workers did not answer in time; ask for them later"


@dataclass(frozen=True)
class Receipt:
    """What was done to one output. An unsteered one has empty identities, no sites and zero tokens.

    `steered_tokens` counts what was seen to go through the steered sites: every prompt token where the prefill was
    steered, and every new token but the last where the decode was: the last one decides nothing of the output. `gates`
    says what each gate did on those tokens; with beam search, on those of all beams of the prompt. `monitor` is the
    digest of the monitor that stood before what the decode received, "" where none did. `vectors` and `probes` are the
    origins of all that added or decided something. `default_left` is the least share of the server's default that the
    request left in force, None where there is no default. `interventions` say what each of the spec did, in the order
    in which they were written.
    """

    identity: Mapping[Phase, str]
    sites: tuple[Site, ...]
    steered_tokens: Mapping[Phase, int]
    gates: tuple[GateUse, ...] = ()
    monitor: str = ""
    vectors: tuple[Origin, ...] = ()
    probes: tuple[Origin, ...] = ()
    default_left: float | None = None
    interventions: tuple[InterventionUse, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The receipt in JSON's types, as docs/serving.md describes it; `gates` only where there are any."""
        left = {} if self.default_left is None else {"default_left": round(self.default_left, 4) + 0.0}
        told: dict[str, Any] = {
            "identity": {phase.value: identity for phase, identity in self.identity.items()},
            "sites": [str(site) for site in self.sites],
            "vectors": [{"name": origin.name, "digest": origin.digest.hex()} for origin in self.vectors],
            "probes": [
                {"name": origin.name, "digest": origin.digest.hex(), "direction": origin.direction.hex()}
                for origin in self.probes
            ],
            "server_default": self.default_left is not None,
            **left,
            **({"monitor": self.monitor} if self.monitor else {}),
            "steered_tokens": {phase.value: count for phase, count in self.steered_tokens.items()},
            "interventions": [use.as_json() for use in self.interventions],
        }
        return with_gates(told, self.gates) if self.gates else told


def receipt_of(
    steering: ResolvedSteering | None,
    prompt_length: int = 0,
    new_tokens: int = 0,
    *,
    gates: Iterable[GateUse] = (),
    slots: Iterable[SlotUse] | None = None,
    default_left: float | None = None,
    tokens: Sequence[int] | None = None,
) -> Receipt:
    """The receipt of an output of `new_tokens` tokens behind a prompt, counted by the rule of `received`, for which
    `tokens` are the ids of both where they decide. `slots` are what slots did, None where that is not known."""
    counts = MappingProxyType(steered_tokens(steering, prompt_length, new_tokens, tokens))
    if steering is None:
        return Receipt(MappingProxyType(dict.fromkeys(Phase, "")), (), counts)
    return Receipt(
        identity=MappingProxyType({phase: steering.identity(phase) for phase in Phase}),
        sites=steering.sites,
        steered_tokens=counts,
        gates=tuple(gates),
        monitor=monitor_of(steering),
        vectors=steering.vectors,
        probes=steering.probes,
        default_left=default_left,
        interventions=uses_of(steering, prompt_length, new_tokens, slots, tokens),
    )


def with_gates(told: Mapping[str, Any], gates: Iterable[GateUse] | None) -> dict[str, Any]:
    """A receipt in JSON's types with what its gates did; None says that this is not known yet."""
    if gates is None:
        return {**told, "gates": None, "gates_missing": GATES_MISSING}
    return {**told, "gates": [asdict(use) for use in gates]}
