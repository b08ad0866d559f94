"""A request's steering with every name resolved: what the engines are given."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from trimtab.errors import SteeringError
from trimtab.program.joint_gate import Condition, check_served, is_monitor
from trimtab.program.programs import PhaseProgram, Term, distinct, together
from trimtab.program.run_names import NamedRuns, identity_of, named_runs
from trimtab.program.slots import Slot, counted
from trimtab.program.spans import Spans
from trimtab.sites import MOST_SLOTS_OF_PHASE, GateLimits, Phase, Site, SlotLimits


class Origin(NamedTuple):
    """Content that a spec asked for, as reports name it.

    `digest` is that of the whole vector, before `layers` narrowed it, or of the probe, its bias included. `name` is the
    registered one, None for content that stood in the spec. `direction` is the digest of a probe's direction, b"" for a
    vector.
    """

    name: str | None
    digest: bytes
    direction: bytes = b""


class Where(NamedTuple):
    """The positions at which an intervention acts, as half-open ranges of tokens that are sorted and do not touch."""

    prompt: tuple[tuple[int, int], ...]
    answer: tuple[tuple[int, int | None], ...]  # counted from the answer's first token; None: no end
    by_tokens: bool = False  # whether the answer's own tokens decide at which of these it acts


class Asked(NamedTuple):
    """An intervention of a spec, as receipts tell of it."""

    place: int  # among those of the request, or of the server's default
    kind: str
    vectors: tuple[Origin, ...]  # in the order of its fields
    by_default: bool = False
    where: Where | None = None  # None in a request that says no more than phases


SPANS = tuple(Phase)  # of the positions of a request that says no more than phases, in their order


@dataclass(frozen=True)
class ResolvedSteering:
    """A request's steering with every name resolved: its programs, and which of its positions receive which.

    `spans` says that for one prompt. Without, there is one program for each `Phase`, in their order. `vectors` and
    `probes` are the origins of what the spec asked for and the programs hold, in the order of the spec; `asked` are all
    interventions of the spec, of which terms and slots say which asked for them. They are no part of what is done, so
    they do not travel: a process that decodes steering does not know them.
    """

    programs: tuple[PhaseProgram, ...]
    vectors: tuple[Origin, ...] = field(default=(), compare=False)
    probes: tuple[Origin, ...] = field(default=(), compare=False)
    asked: tuple[Asked, ...] = field(default=(), compare=False)
    spans: Spans | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if len(self.programs) != len(self.phases):
            wanted = "one for each of " + ", ".join(Phase) if self.spans is None else f"{len(self.phases)}"
            raise ValueError(f"{len(self.programs)} programs; want {wanted}")
        for phase, program in zip(self.phases, self.programs, strict=True):
            if program.is_scheduled and (self.spans is None or phase is not Phase.DECODE):
                raise ValueError("a schedule is one of tokens of an answer, by spans")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Of each program, which tokens may receive it."""
        return SPANS if self.spans is None else self.spans.phases

    @property
    def prefill(self) -> PhaseProgram:
        """The program of prompt tokens, where there are no `spans`."""
        return self.program(Phase.PREFILL)

    @property
    def decode(self) -> PhaseProgram:
        """The program of the tokens that follow, where there are no `spans`."""
        return self.program(Phase.DECODE)

    def program(self, phase: Phase) -> PhaseProgram:
        """The one program of a phase, where there are no `spans`."""
        if self.spans is not None:
            raise ValueError(f"there is no one program of {phase}: tokens receive what the spans say")
        return self.programs[SPANS.index(phase)]

    def programs_of(self, phase: Phase) -> tuple[PhaseProgram, ...]:
        """The programs that tokens of a phase may receive."""
        return tuple(program for own, program in zip(self.phases, self.programs, strict=True) if own is phase)

    def identity(self, phase: Phase) -> str:
        """Hex digest of all that changes the KV of that phase's tokens; "" where they are not steered.

        Where all of them receive one program it is that program's.
        """
        phase = Phase(phase)
        return self.program(phase).identity if self.spans is None else self._identities[phase]

    @cached_property
    def runs(self) -> NamedRuns:
        """The runs of `spans`, as far as they differ, and what tokens receive in each. Without spans there are none."""
        return named_runs(self.spans, self._told) if self.spans else ()

    @property
    def _told(self) -> list[tuple[str, bool]]:
        return [(program.identity, program.is_scheduled) for program in self.programs]

    @cached_property
    def _identities(self) -> dict[Phase, str]:
        assert self.spans is not None, "a program of a phase has its own"
        first = {Phase.PREFILL: 0, Phase.DECODE: self.spans.prompt_length}
        return {phase: identity_of(named_runs(self.spans, self._told, phase), first[phase]) for phase in Phase}

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which any program does something, in the order of the forward pass."""
        return together(*{program.sites for program in self.programs})

    @cached_property
    def gates(self) -> tuple[Condition, ...]:
        """The different gates of all programs, in canonical order."""
        return tuple(distinct(item.gate for program in self.programs for item in program.gated))

    @cached_property
    def asked_in(self) -> tuple[frozenset[int], ...]:
        """In which of `programs`, by their places, each intervention of `asked` does something."""
        found: list[set[int]] = [set() for _ in self.asked]
        for place, program in enumerate(self.programs):
            asked_by = [*(term.asked_by for term in program.all_terms), *(slot.asked_by for slot in program.slots)]
            for index in frozenset[int]().union(*asked_by):
                found[index].add(place)
        return tuple(map(frozenset, found))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of all programs, those behind gates too."""
        return tuple(term for program in self.programs for term in program.all_terms)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of all programs."""
        return tuple(slot for program in self.programs for slot in program.slots)

    def check_gate_count(self, limits: GateLimits, field: str) -> None:
        """Raise `SteeringError` at `field` where a phase has more gates than an engine with these limits serves: of
        those made of several each member counts."""
        most = max(
            program.lane_count - any(is_monitor(item.gate, limits) for item in program.gated)
            for program in self.programs
        )
        if most > limits.count:
            raise SteeringError(
                field,
                f"has {most} different gates on one token; this engine serves {limits.count} per request (its setting "
                "`gates`). Interventions with equal gates share one; in `all` and `any` each member counts, and so "
                "does a `schedule` where more than that acts on one token",
            )

    def check_gates(self, limits: GateLimits, field: str) -> None:
        """Raise `SteeringError` at `field` where an engine with these limits does not serve the gates, or so many: what
        a front end and an engine core ask of the same steering, so that none admits what the other refuses. What a
        program's own row follows is no gate."""
        programs = [program for program in self.programs if program.gated]
        if not programs:
            return
        self.check_gate_count(limits, field)
        for program in programs:
            for gate, sites in program.lane_gates:
                try:
                    check_served(gate, sites, limits)
                except SteeringError as error:
                    raise SteeringError(field, str(error)) from None

    def check_slot_count(self, limits: SlotLimits, field: str) -> None:
        """Raise `SteeringError` at `field` where more slots act at a site than an engine with these limits serves, or
        more in all than can travel."""
        for program in self.programs:
            if len(program.slots) > (most := MOST_SLOTS_OF_PHASE):
                said = f"has {len(program.slots)} slots on one token, at most {most} are served: leave some out"
                raise SteeringError(field, said)
            for site, count in counted(program.slots).items():
                if count > limits.count:
                    said = f"has {count} slots at {site} on one token; this engine serves {limits.count} there: "
                    said += f"start it with --steering-slots {count}, or " if count <= limits.most else ""
                    raise SteeringError(field, f"{said}leave interventions out")
