"""What a caller hands to `generate`, brought into one form: one resolved steering per prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from trimtab.engines.transformers.prompts import Encoded
from trimtab.errors import SteeringError
from trimtab.instrument.hookmap import HookMap
from trimtab.program import ResolvedSteering
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import MONITOR_LABEL, ResolvedGate, check_monitor
from trimtab.sites import MOST_SLOTS_EMBEDDED, GateLimits, ModelSites, SlotLimits
from trimtab.spec import Gate, Steering
from trimtab.spec.base import below
from trimtab.spec.faults import join
from trimtab.spec.kinds import DECLARED
from trimtab.spec.places import token_run
from trimtab.spec.prompt_tokens import PromptTokens, Tags
from trimtab.spec.unplaced import Unplaced
from trimtab.vectors.probe import Probe
from trimtab.vectors.stream_norms import StreamNorms
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown


@dataclass(frozen=True)
class Names:
    """What specs may name, how many gates a phase of theirs may have, and the monitor that stands before them all."""

    vectors: Mapping[str, SteeringVector]
    probes: Mapping[str, Probe]
    gates: int
    monitor: ResolvedGate | None = None
    norms: StreamNorms | None = None

    def served_by(self, hook_map: HookMap) -> ModelSites:
        """The model's sites, with its gates, and with slots of every kind at all of them."""
        sites = hook_map.sites.sites
        most = MOST_SLOTS_EMBEDDED
        slots = SlotLimits(most, sites, frozenset(DECLARED), most)
        return replace(hook_map.sites, gates=GateLimits(self.gates, sites), slots=slots)


def resolve_monitor(monitor: Any, probes: Mapping[str, Probe], hook_map: HookMap) -> ResolvedGate | None:
    """The monitor that a caller describes as a gate is described, or None. Raises SteeringError below `monitor`."""
    if monitor is None:
        return None
    if not isinstance(monitor, Mapping) or not all(isinstance(key, str) for key in monitor):
        raise SteeringError("monitor", f'is a {type(monitor).__name__}; want {{"probe": ..., "threshold": ...}}')
    try:
        gate = Gate(**monitor).resolve(probes)
        check_monitor(gate)
    except SteeringError as error:
        raise SteeringError(join("monitor", error.field), error.message) from None
    if (reason := hook_map.refusal(gate.site)) is not None:
        raise SteeringError("monitor.probe", f"is read at {gate.site}: {reason}")
    if gate.probe.hidden_size != (width := hook_map.sites.hidden_size):
        raise SteeringError("monitor.probe", f"has width {gate.probe.hidden_size}; this model needs {width}")
    return replace(gate, label=MONITOR_LABEL)


def resolve_norms(norms: str | Path | SteeringVector | None, hook_map: HookMap) -> StreamNorms | None:
    """The norms of a vector or its file, or None. Raises SteeringError at `norms`, also for a site that the model
    lacks."""
    if norms is None:
        return None
    if not isinstance(norms, (str, Path, SteeringVector)):
        raise SteeringError("norms", f"is a {type(norms).__name__}; want a vector's file, or a SteeringVector")
    try:
        found = StreamNorms.said_by(norms) if isinstance(norms, SteeringVector) else StreamNorms.load(norms)
    except SteeringError as error:
        raise SteeringError("norms", str(error)) from error
    found.check(hook_map.sites, "norms")
    for site in found.by_site:
        if (reason := hook_map.refusal(site)) is not None:
            raise SteeringError("norms", f"has a norm at {site}: {reason}")
    return found


@dataclass(frozen=True)
class Reader:
    """What prompts are read with, where specs name texts, roles, special tokens or a section."""

    tokenizer: Any = None
    think_tags: Tags | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, think_tags: Any, vocabulary: int) -> Self:
        """`think_tags` are two, each a text or token ids, or None. Raises SteeringError for what is no tag."""
        if think_tags is None:
            return cls(tokenizer, None, vocabulary)
        if not isinstance(think_tags, (list, tuple)) or len(think_tags) != 2:
            raise SteeringError("think_tags", f"got {shown(think_tags)}, want two tags, as in ('<think>', '</think>')")
        runs = []
        for index, tag in enumerate(think_tags):
            with below(f"think_tags[{index}]"):
                runs.append(token_run(tag))
        return cls(tokenizer, Tags((runs[0],), (runs[1],)), vocabulary)

    def tokens_of(self, prompt: Encoded) -> PromptTokens:
        """One prompt as `where` looks at it."""
        return PromptTokens(
            len(prompt.ids),
            prompt.ids,
            self.tokenizer,
            messages=prompt.messages,
            tags=self.think_tags,
            vocabulary_size=self.vocabulary,
        )


def resolve_all(
    steering: Any, prompts: Sequence[Encoded], names: Names, hook_map: HookMap, reader: Reader
) -> list[ResolvedSteering | None]:
    """One resolved steering or None for each of `prompts`. One spec, or None, stands for all of them.

    Raises SteeringError naming the place in the caller's input: `steering[2].interventions[0].scale`.
    """
    count = len(prompts)
    if steering is None:
        return [None] * count
    if isinstance(steering, (str, bytes, Mapping, Steering)):
        resolved = _resolve(steering, "", names, hook_map)
        told = [f" (in prompts[{index}])" * (count > 1) for index in range(count)]
        return [_placed(resolved, "", names, reader, one, said) for one, said in zip(prompts, told, strict=True)]
    if not isinstance(steering, Sequence):
        raise SteeringError("steering", f"is a {type(steering).__name__}; want a spec, None, or a list of them")
    if len(steering) != count:
        raise SteeringError("steering", f"has {len(steering)} entries for {count} prompts; want one spec or None each")
    found: list[ResolvedSteering | None] = []
    for index, (spec, prompt) in enumerate(zip(steering, prompts, strict=True)):
        field = f"steering[{index}]"
        if spec is None:
            found.append(None)
        else:
            found.append(_placed(_resolve(spec, field, names, hook_map), field, names, reader, prompt))
    return found


def _resolve(spec: Any, prefix: str, names: Names, hook_map: HookMap) -> ResolvedSteering | Unplaced:
    """A spec as all prompts have it."""
    try:
        norms = None if names.norms is None else names.norms.by_site
        found = Steering.parse(spec).resolve(names.vectors, names.served_by(hook_map), names.probes, norms=norms)
    except SteeringError as error:
        field = f"{prefix}.{error.field}".strip(".")
        raise SteeringError(field, error.message + _reason(error, hook_map)) from None
    return found if isinstance(found, Unplaced) else _monitored(found, names)


def _placed(
    resolved: ResolvedSteering | Unplaced, prefix: str, names: Names, reader: Reader, prompt: Encoded, told: str = ""
) -> ResolvedSteering:
    """A spec as one prompt has it; `told` says in a refusal which that is, where `prefix` does not."""
    if not isinstance(resolved, Unplaced):
        return resolved
    try:
        return _monitored(resolved.placed(reader.tokens_of(prompt)), names)
    except SteeringError as error:
        raise SteeringError(f"{prefix}.{error.field}".strip("."), error.message + told) from None


def _monitored(resolved: ResolvedSteering, names: Names) -> ResolvedSteering:
    return resolved if names.monitor is None else behind(resolved, names.monitor)


def _reason(error: SteeringError, hook_map: HookMap) -> str:
    """Why the model lacks the hook point that the error is about."""
    for hook, reason in hook_map.refusals.items():
        if hook.value in error.field or hook.value in error.message:
            return f" ({hook.value}: {reason})"
    return ""
