"""Steering whose positions are known once its prompt is.

A spec with `where` is resolved in two steps: first names, numbers and sites, without a prompt, to an `Unplaced`; then,
with each prompt that it is for, to `ResolvedSteering` with spans. Everything that can be refused at once is.
"""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property

from trimtab.errors import SteeringError
from trimtab.program import EMPTY, Asked, PhaseProgram, ResolvedSteering, Slot, Spans, Where
from trimtab.program.joint_gate import Condition
from trimtab.program.programs import distinct
from trimtab.sites import ModelSites, Phase, Site
from trimtab.spec import where as spoken
from trimtab.spec.base import NowhereError, below
from trimtab.spec.intervals import OPEN
from trimtab.spec.kinds import Step
from trimtab.spec.layout import laid_out
from trimtab.spec.made import Made, check_clocks
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.selected import NOWHERE, Selected, selected

_MOST_CHECKED = 1024  # that are remembered

_OF_PHASE = {
    "all": spoken.Where(),
    "prefill": spoken.Where(prompt="all"),
    "decode": spoken.Where(answer="all"),
}


@dataclass(frozen=True, eq=False)
class Unplaced:
    """A spec of which some interventions say `where` they act, with every name resolved, for an engine of `model`.

    The first `defaults` of them are a server's: where one selects nothing of a prompt, it does nothing there. Raises
    `SteeringError` for an intervention that the engine could not serve by itself.
    """

    made: Made
    model: ModelSites
    defaults: int = 0
    _checked: set[tuple[tuple[int, ...], Phase]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for index, step in enumerate(self.made.steps):
            for phase in Phase if step.schedule is not None else (Phase.PREFILL,):
                self._program((index,), phase)

    def placed(self, prompt: PromptTokens) -> ResolvedSteering:
        """The steering of one prompt and its answer.

        Raises `SteeringError` at the field of a `where` that this prompt cannot have, for interventions that clash
        where they meet in it, and for more runs or programs than engines hold.
        """
        selections = [self._selected(index, prompt) for index in range(len(self.made.steps))]
        spans, together, idle = laid_out(selections, prompt.length)
        if own := [index for index in idle if index >= self.defaults]:
            said = where_of(self.made.steps[own[0]]).conditions_told
            raise SteeringError(f"interventions[{own[0]}].where", f"selects nothing: {said}; change one of them")
        programs = tuple(map(self._program, together, spans.phases))
        told = zip(self.asked, selections, strict=True)
        asked = tuple(_told(one, chosen) for one, chosen in told)
        return ResolvedSteering(programs, *self.made.origins(programs), asked, spans=spans)

    @cached_property
    def asked(self) -> tuple[Asked, ...]:
        """Each intervention as receipts tell of it, but for its place in a prompt."""
        return self.made.asked(self.defaults)

    @cached_property
    def alone(self) -> tuple[PhaseProgram, ...]:
        """What each intervention does by itself, at full strength."""
        return tuple(self._program((index,)) for index in range(len(self.made.steps)))

    @cached_property
    def sites(self) -> frozenset[Site]:
        """Where any intervention does something."""
        return frozenset(site for program in self.alone for site in program.sites)

    @cached_property
    def gates(self) -> tuple[Condition, ...]:
        """The different gates of all interventions, in canonical order."""
        return tuple(distinct(item.gate for program in self.alone for item in program.gated))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of all interventions."""
        return tuple(slot for program in self.alone for slot in program.slots)

    @cached_property
    def identity_of_spec(self) -> str:
        """Hex digest of what is done and of the words that say where; not of names. No two things that can be done
        have one; one thing that is said in two ways may have two."""
        whole = hashlib.sha256(b"trimtab unplaced 1\0")
        for step, program in zip(self.made.steps, self.alone, strict=True):
            schedule = None if step.schedule is None else step.schedule.model_dump(mode="json")
            told = [where_of(step).model_dump(mode="json"), *([] if schedule is None else [schedule])]
            said = json.dumps(told, sort_keys=True).encode()
            whole.update(bytes.fromhex(program.identity) + b"\0" + hashlib.sha256(said).digest())
        return whole.hexdigest()

    def _selected(self, index: int, prompt: PromptTokens) -> Selected:
        by_default = index < self.defaults
        try:
            with below(f"interventions[{index}].where"):
                return selected(where_of(self.made.steps[index]), prompt, lenient=by_default)
        except NowhereError:
            if by_default:
                return NOWHERE
            raise

    def _program(self, together: tuple[int, ...], phase: Phase = Phase.PREFILL) -> PhaseProgram:
        program = self.made.program(together, phase)
        if (together, phase) not in self._checked:
            self.made.check_kept(program, self.model)
            alone = ResolvedSteering((EMPTY, program), spans=_WHOLE_ANSWER)
            alone.check_gate_count(self.model.gates, "interventions")
            alone.check_slot_count(self.model.slots, "interventions")
            check_clocks(program, self.model.gates)
            if len(self._checked) < _MOST_CHECKED:
                self._checked.add((together, phase))
        return program


_WHOLE_ANSWER = Spans(1, (0, 1), (0, 1), ((0,), (1,)), tuple(Phase))


def where_of(step: Step) -> spoken.Where:
    """The `where` of an intervention, or what its `phase` is short for."""
    return _OF_PHASE[step.phase] if step.where is None else step.where


def _told(asked: Asked, chosen: Selected) -> Asked:
    """An intervention with the positions that it was given."""
    answer = tuple((first, None if stop == OPEN else stop) for first, stop in chosen.kept.answer)
    return asked._replace(where=Where(chosen.prompt, answer, by_tokens=any(True for _ in chosen.atoms)))
