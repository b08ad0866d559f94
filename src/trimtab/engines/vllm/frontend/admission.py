"""Admission: the one validator behind every door through which a request can reach the engine.

`FrontEnd.admit` takes what a caller gave as `steering`, merges the server's default, resolves names, checks it against
what the engine serves, and returns the form that travels with the request; where the spec says where it acts, that form
is made for each prompt once it is known. Nothing here imports vLLM.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from trimtab.engines.vllm.carried import Carried, held_bytes
from trimtab.engines.vllm.frontend.pending import Pending
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.program.codec import encode
from trimtab.program.monitor import behind
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.program.room import check_room
from trimtab.recent import Recent
from trimtab.serving.memo import key_of
from trimtab.serving.names import check_fixed, check_known
from trimtab.serving.registry import ProbeRegistry, VectorRegistry
from trimtab.serving.server_default import ServerDefault, merge
from trimtab.sites import HookPoint, ModelSites, Phase
from trimtab.spec import Steering
from trimtab.spec.base import Model
from trimtab.spec.faults import join
from trimtab.spec.gate import Gate
from trimtab.spec.joint_gate import AllOf, AnyOf
from trimtab.spec.kinds import KINDS
from trimtab.spec.places import RolePlace, TextPlace
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.unplaced import Unplaced
from trimtab.spec.where import Section, Where
from trimtab.vectors.probe import Probe
from trimtab.vectors.stream_norms import StreamNorms
from trimtab.vectors.vector import SteeringVector

FIELD = "steering"  # the request's field, at every door

DEFAULT = "the server's default spec"  # in messages

Resolved = ResolvedSteering | Unplaced

_Left = Callable[[PromptTokens | None], float | None]

# Labels of the refusal counter: a fixed set, since field paths hold what callers wrote.
_MODELS: tuple[type[Model], ...] = (Steering, *KINDS, Gate, AllOf, AnyOf, Where, TextPlace, RolePlace, Section)
REASONS = frozenset(field.alias or name for model in _MODELS for name, field in model.model_fields.items())
REASONS |= {"dtype", "shape", "layer_indices", "data", *HookPoint}
REASONS |= {"disabled", "beam_search", "resumable", "twice", "route", "place"}


class Catalogue(NamedTuple):
    """What names stand for at one moment."""

    vectors: Mapping[str, SteeringVector]
    probes: Mapping[str, Probe]


class Monitor(NamedTuple):
    """A server's monitor, and how its status route shows it."""

    gate: ResolvedGate
    shown: Mapping[str, Any]


class Observer(Protocol):
    """Counts what happens at the doors."""

    def steered(self) -> None: ...
    def refused(self, reason: str) -> None: ...


class FrontEnd:
    """The front end of one engine: its registry, its default spec, and the sites that it serves.

    Raises `SteeringError` if the default spec cannot be honoured, so that a server with such a default does not start.
    """

    def __init__(
        self,
        model: ModelSites,
        registry: VectorRegistry,
        default: Any = None,
        observer: Observer | None = None,
        probes: ProbeRegistry | None = None,
        monitor: Monitor | None = None,
        norms: StreamNorms | None = None,
        drafts: int = 0,
    ) -> None:
        """`drafts` are the tokens that the engine may guess ahead in one step."""
        self.model = model
        self._drafts = drafts
        self.norms = norms
        self.monitor = monitor
        self.registry = registry
        self.probes = ProbeRegistry({}) if probes is None else probes
        self.default = None if default is None else _parse_default(default)
        self._observer = observer
        self._held = {vector.digest for vector in self.registry.start.values()}  # what workers have from start
        self._held |= {probe.vector.digest for probe in self.probes.start.values()}
        self._held |= set() if monitor is None else {monitor.gate.probe.digest}
        self._default_admission: tuple[Catalogue, Carried | Pending, Resolved] | None = None
        # Admissions of specs that consist of names, and what the names stood for.
        self._recent: tuple[Catalogue | None, Recent[Carried | Pending]] = (None, Recent())
        self._last_names = Catalogue({}, {})
        if self.default is not None:
            check_fixed(self.default.spec, self.registry, self.probes)
            self.admit(None, count=False)

    def admit(self, given: Any, *, count: bool = True) -> Carried | Pending | None:
        """Admit `given`: a `Steering`, a mapping or a JSON string, or None where the request says nothing.

        None if there is nothing to add, not even a default. Raises `SteeringError` whose field starts at the request's
        own `steering`.
        """
        if given is None and self.default is None:
            return None
        try:
            admitted = self._admit_default()[0] if given is None else self._admit(given)
        except SteeringError as error:
            raise self._refusal(error, count=count) from error
        if count and not isinstance(admitted, Pending):
            self.steered()
        return admitted

    def steered(self) -> None:
        """Count a request whose steering is no more refused."""
        if self._observer is not None:
            self._observer.steered()

    def _refusal(self, error: SteeringError, *, count: bool = True) -> SteeringError:
        self.refuse(error.field, count=count)
        return SteeringError(join(FIELD, error.field), error.message)

    def refuse(self, field: str, *, count: bool = True) -> None:
        """Count a refusal under the innermost known part of `field`."""
        if count and self._observer is not None:
            self._observer.refused(refusal_reason(field))

    def _admit_default(self) -> tuple[Carried | Pending, Resolved]:
        """The default, and what it asks for without the monitor."""
        names = self._names()
        if self._default_admission is None or self._default_admission[0] is not names:
            assert self.default is not None
            try:
                asked = self._resolve(self.default.spec, names, self.default.count)
                if not asked.sites:
                    raise SteeringError("interventions", "adds nothing: leave the default out, or correct it")
                admitted = self._admitted(asked, lambda _: 1.0, DEFAULT)
            except SteeringError as error:
                # The operator's spec, not the caller's: say so, with the path in the operator's own file.
                raise SteeringError("", f"{DEFAULT}: {error}") from error
            self._default_admission = (names, admitted, asked)
        return self._default_admission[1:]

    def _admit(self, given: Any) -> Carried | Pending:
        names = self._names()
        under, recent = self._recent  # read once: admissions run in several threads
        if under is not names:
            recent = Recent()
            self._recent = (names, recent)
        key = given if type(given) is Steering and _names_alone(given) else key_of(given)
        if (known := recent.get(key)) is not None:
            return known
        steering = Steering.parse(given)
        admitted = self._admit_anew(steering, names)
        if isinstance(admitted, Pending):
            if _names_alone(steering):
                alone = (ResolvedSteering((program,) * len(Phase)) for program in admitted.unplaced.alone)
                recent.put(key, admitted, sum(map(held_bytes, alone)))
        elif not any("data" in vector for vector in admitted["vectors"]):  # content is too much to keep
            recent.put(key, admitted, held_bytes(admitted.steering))
        return admitted

    def _admit_anew(self, steering: Steering, names: Catalogue) -> Carried | Pending:
        own = self._resolve(steering, names)
        if self.default is None:
            return self._admitted(own, lambda _: None)
        server_default, (_, default) = self.default, self._admit_default()

        def left(prompt: PromptTokens | None) -> float:
            def resolved(part: Steering) -> ResolvedSteering:
                asked = own if part is steering else self._resolve(part, names)
                return self._monitored(_placed(asked, prompt))

            return server_default.left_by(steering, resolved, _placed(default, prompt))

        unplaced = isinstance(own, Unplaced) or isinstance(default, Unplaced)
        known = None if unplaced else left(None)
        together = f"together with {DEFAULT}"
        try:
            asked = self._resolve(merge(self.default.spec, steering), names, self.default.count)
            return self._admitted(asked, left if known is None else lambda _: known, together)
        except SteeringError as error:
            raise SteeringError("", f"{together}: {error}") from error

    def _admitted(self, asked: Resolved, left: _Left, whose: str = "") -> Carried | Pending:
        """`asked` in the form that travels, or what makes that of a prompt. `left` says what of the default is left,
        `whose` spec is at fault where not all of it is the request's."""
        if isinstance(asked, ResolvedSteering):
            return self._carried(asked, left(None))

        def place(prompt: PromptTokens) -> Carried:
            try:
                default_left = left(prompt)  # first: it tells the request's faults in its own terms
                try:
                    return self._carried(asked.placed(prompt), default_left)
                except SteeringError as error:
                    if not whose:
                        raise
                    raise SteeringError("", f"{whose}: {error}") from error
            except SteeringError as error:
                raise self._refusal(error) from error

        return Pending(asked, place)

    def _names(self) -> Catalogue:
        """What names stand for now: the same object as long as nothing changes."""
        names, last = Catalogue(self.registry.vectors(), self.probes.vectors()), self._last_names
        if names.vectors is last.vectors and names.probes is last.probes:
            return last
        self._last_names = names
        return names

    def _resolve(self, steering: Steering, names: Catalogue, defaults: int = 0) -> Resolved:
        check_known(steering, self.registry, self.probes)
        norms = None if self.norms is None else self.norms.by_site
        return steering.resolve(names.vectors, self.model, names.probes, defaults=defaults, norms=norms)

    def _check_drafts(self, steering: ResolvedSteering) -> None:
        if steering.spans is None or not steering.spans.decided_by_tokens:
            return
        from trimtab.ops.span_buffers import MOST_DRAFTS  # only here: it brings torch along

        if self._drafts > MOST_DRAFTS:
            raise SteeringError(
                "interventions",
                f"are decided by the answer's tokens, of which this engine guesses {self._drafts} at a time; at most "
                f"{MOST_DRAFTS} are followed: say `where` by positions, or start it with fewer num_speculative_tokens",
            )

    def _monitored(self, asked: ResolvedSteering) -> ResolvedSteering:
        return asked if self.monitor is None else behind(asked, self.monitor.gate)

    def _carried(self, asked: ResolvedSteering, default_left: float | None = None) -> Carried:
        steering = self._monitored(asked)
        steering.check_gates(self.model.gates, "interventions")  # a monitor stands before schedules as a gate of each
        check_room(steering, self.model.room, "")
        self._check_drafts(steering)
        return Carried(encode(steering, self._held, views=True), steering, default_left)


def _placed(asked: Resolved, prompt: PromptTokens | None) -> ResolvedSteering:
    if isinstance(asked, ResolvedSteering):
        return asked
    assert prompt is not None, "what says where it acts waits for a prompt"
    return asked.placed(prompt)


def _parse_default(given: Any) -> ServerDefault:
    try:
        return ServerDefault.parse(given)
    except SteeringError as error:
        raise SteeringError(join(f"{FIELD}.default", error.field), error.message) from error


def _names_alone(steering: Steering) -> bool:
    return all(
        all(isinstance(source, str) for source in step.sources.values())
        and all(isinstance(gate.probe, str) for gate in step.gates.values())
        for step in steering.interventions
    )


def refusal_reason(field: str) -> str:
    """The innermost part of a field path that is one of `REASONS`, "other" if none is."""
    parts = re.split(r"[.\[\]]+", field)
    return next((part for part in reversed(parts) if part in REASONS), "other")
