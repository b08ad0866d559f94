"""The settings of slots: which kinds of intervention an engine serves besides adding, where, and how many at a time.

What was not declared at start is not in the graphs of the engine: a request that asks for it is refused.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.errors import SteeringError
from trimtab.program import PhaseProgram
from trimtab.program.slots import counted
from trimtab.responses import CLIP, RESPONSES
from trimtab.sites import Site, SlotLimits
from trimtab.spec.kinds import DECLARED, KINDS
from trimtab.spec.request import MAX_INTERVENTIONS
from trimtab.wording import with_suggestions

if TYPE_CHECKING:
    from trimtab.ops.args import SlotForm

DEFAULT_KINDS = ("ablate", "clamp", "scale")

KNOWN = (*DECLARED, *(str(kind.model_fields["kind"].default) for kind in KINDS if not kind.responses))


def checked_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Kinds that were named, each once, in the order of `DECLARED`. Raises ValueError for one that does not exist."""
    named = set(kinds)
    for name in sorted(named.difference(KNOWN)):
        raise ValueError(f"there is no kind {name!r:.80}{with_suggestions(name, DECLARED)}; the kinds are "
                         f"{', '.join(DECLARED)}")  # fmt: skip
    if not named.intersection(DECLARED):
        raise ValueError(f"names no kind that needs slots: these are {', '.join(DECLARED)}")
    return tuple(name for name in DECLARED if name in named)


def slot_limits(
    count: int, kinds: Sequence[str] | None, layers: Sequence[int] | None, sites: frozenset[Site]
) -> SlotLimits:
    """What the settings come to for an engine that steers `sites`: slots at `layers`, None being wherever it steers.

    Raises `SteeringError` for settings that would have no effect, and for a layer that is not steered.
    """
    if not count:
        for field, given in (("kinds", kinds), ("slot_layers", layers)):
            if given is not None:
                raise SteeringError(
                    f"{SETTINGS_KEY}.{field}",
                    "is given without slots, so no request could use them: set `slots` (--steering-slots N) too",
                )
        return SlotLimits()
    steered = {site.layer for site in sites}
    chosen = steered if layers is None else set(layers)
    if outside := sorted(chosen - steered):
        raise SteeringError(f"{SETTINGS_KEY}.slot_layers", f"layers {outside} are not among the steered layers")
    at = frozenset(site for site in sites if site.layer in chosen)
    return SlotLimits(count, at, frozenset(DEFAULT_KINDS if kinds is None else kinds))


def slot_form(limits: SlotLimits) -> "SlotForm | None":
    """What the graphs of an engine with these limits have of slots; None where they have none."""
    if not limits.count:
        return None
    from trimtab.ops.args import SlotForm  # only here: it brings torch along

    responses = tuple(sorted(_responses(limits), key=lambda name: RESPONSES[name].code))
    return SlotForm(limits.count, responses, _writes(limits))


def check_slots(programs: Iterable[PhaseProgram], limits: SlotLimits, field: str) -> None:
    """Raise `SteeringError` at `field` for slots that the graphs of an engine with these limits do not have.

    What a request may ask for is checked with the kinds that it names (`Steering.resolve`); this is for slots that
    come from another process.
    """
    for program in programs:
        for site, count in counted(program.slots).items():
            if site not in limits.sites:
                raise SteeringError(field, f"this engine has no slots at {site} (its settings `slots`, `slot_layers`)")
            if count > limits.count:
                raise SteeringError(field, f"has {count} slots at {site}; this engine has {limits.count} (its `slots`)")
        for slot in program.slots:
            if slot.response not in _responses(limits) or (slot.write is not None and not _writes(limits)):
                raise SteeringError(field, f"has a slot of a kind that this engine does not serve: {slot.response}")


def _responses(limits: SlotLimits) -> set[str]:
    """The responses of slots; one is always there, for the check at start."""
    return {CLIP.name}.union(*(DECLARED[name].responses for name in limits.kinds if name in DECLARED))


def _writes(limits: SlotLimits) -> bool:
    """Whether a slot may write along another direction than it reads."""
    return any(DECLARED[name].writes for name in limits.kinds if name in DECLARED)


def most_slots(limits: SlotLimits) -> int:
    """Slots that tables have rows for in each phase of a request, at all its sites together: one an intervention.

    A request may have more: `rotate` is two slots, `lowrank` one for each vector that it reads. One whose rows do not
    fit at all is refused when it is admitted (`program.room`), and the message names the settings that make room.
    """
    return MAX_INTERVENTIONS if limits.count else 0
