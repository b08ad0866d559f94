"""What the interventions of one spec come down to, and the programs that are made of some of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trimtab.errors import SteeringError
from trimtab.program import Asked, Origin, PhaseProgram, Slot, Term
from trimtab.program.joint_gate import check_served, schedule_of, scheduled
from trimtab.program.norms import keeping_norm
from trimtab.program.slot_sets import formed
from trimtab.sites import GateLimits, ModelSites, Phase, Site, site_order
from trimtab.spec.base import below
from trimtab.spec.kinds import Step
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector

Items = tuple[Term | Slot, ...]

_MOST_KNOWN = 256  # programs of one spec, which may be asked for with ever other prompts


@dataclass(frozen=True, eq=False)
class Made:
    """Interventions whose names are known, `items` being what each comes down to; `keep_norm` is the spec's."""

    steps: tuple[Step, ...]
    items: tuple[Items, ...]
    timed: tuple[Items, ...]  # the same of tokens of an answer, by its schedule if it has one
    keep_norm: bool | str
    vectors: Mapping[str, SteeringVector]
    probes: Mapping[str, Probe]
    _programs: dict[tuple[tuple[int, ...], bool], PhaseProgram] = field(default_factory=dict)

    def program(self, together: tuple[int, ...], phase: Phase = Phase.PREFILL) -> PhaseProgram:
        """What some interventions, by their indices, do to a token together: of an answer, by their schedules. Raises
        `SteeringError` where they clash, and for sums out of range."""
        timed = phase is Phase.DECODE and any(self.steps[index].schedule is not None for index in together)
        if (program := self._programs.get((together, timed))) is None:
            items = [item for index in together for item in (self.timed if timed else self.items)[index]]
            terms = [item for item in items if isinstance(item, Term)]
            with below("interventions"):
                program = PhaseProgram.of(terms, (item for item in items if isinstance(item, Slot)))
            if self.keep_norm:
                program = keeping_norm(program, self.keep_norm == "if_grown")
            if len(self._programs) >= _MOST_KNOWN:
                self._programs.clear()
            self._programs[together, timed] = program
        return program

    def check_kept(self, program: PhaseProgram, model: ModelSites) -> None:
        """Raise `SteeringError` where a norm would have to be kept without slots."""
        for site in program.sites if self.keep_norm else ():
            if site not in model.slots.sites:
                said = f"would have to act at {site}, where this engine has no slots: narrow the interventions with "
                said += "`layers`, or start the engine with more --steering-slot-layers"
                raise SteeringError("keep_norm", said)

    def asked(self, defaults: int) -> tuple[Asked, ...]:
        """Each intervention as receipts tell of it; the first `defaults` are the server's."""
        told: list[Asked] = []
        for index, step in enumerate(self.steps):
            origins = tuple(origin_of(source, self.vectors) for source in step.sources.values())
            by_default = index < defaults
            told.append(Asked(index if by_default else index - defaults, step.kind, origins, by_default))
        return tuple(told)

    def origins(self, programs: Iterable[PhaseProgram]) -> tuple[tuple[Origin, ...], tuple[Origin, ...]]:
        """Of the vectors and of the probes in `programs`: not of what other terms, or a scale of 0, have cancelled."""
        programs = list(programs)
        added = {vector.digest for program in programs for vector in program.vectors}
        read = {one.probe.digest for program in programs for item in program.gated for one in item.gate.members}
        used: dict[Origin, None] = {}
        decided: dict[Origin, None] = {}
        for step, items in zip(self.steps, self.items, strict=True):
            if any(_acts(item, added) for item in items):
                used.update((origin_of(source, self.vectors), None) for source in step.sources.values())
            for gate in step.gates.values() if any(item.gate for item in items) else ():
                if (origin := origin_of(gate.probe, self.probes)).direction in read:
                    decided[origin] = None
        return tuple(used), tuple(decided)


def behind_schedules(steps: Sequence[Step], items: Sequence[Items], limits: GateLimits) -> tuple[Items, ...]:
    """The items of each step as tokens of an answer have them, in an engine with these limits."""
    found: list[Items] = []
    for step, own in zip(steps, items, strict=True):
        schedule = None if step.schedule is None else step.schedule.resolved
        if schedule is not None:
            sites = [_clock_site(item.sites[0], limits) for item in own]
            gates = [scheduled(one.gate, schedule, at, one.hidden_size) for one, at in zip(own, sites, strict=True)]
            own = tuple(replace(item, gate=gate) for item, gate in zip(own, gates, strict=True))
        found.append(own)
    return tuple(found)


def _clock_site(first: Site, limits: GateLimits) -> Site:
    """Where a schedule of what acts from `first` on is read: for all that can share one at one site."""
    stage = limits.stage(first.layer)
    read = min((site for site in limits.read_sites if limits.stage(site.layer) == stage), key=site_order, default=first)
    return read if site_order(read) <= site_order(first) else first


def check_clocks(program: PhaseProgram, limits: GateLimits) -> None:
    """Raise `SteeringError` where a schedule that needs a lane cannot have one."""
    for gate, sites in program.lane_gates:
        if schedule_of(gate) is not None:
            try:
                check_served(gate, sites, limits)
            except SteeringError as error:
                raise SteeringError("interventions", f"a `schedule` of them {error.message}") from None


def origin_of(given: str | SteeringVector | Probe, names: Mapping[str, SteeringVector] | Mapping[str, Probe]) -> Origin:
    """The origin of what a spec gave by name or as it is."""
    name, content = (given, names[given]) if isinstance(given, str) else (None, given)
    return Origin(name, content.digest, content.vector.digest if isinstance(content, Probe) else b"")


def _acts(item: Term | Slot, added: set[bytes]) -> bool:
    return bool(formed([item])) if isinstance(item, Slot) else item.vector.digest in added
