"""Admission: the one validator behind every door through which a request can reach the engine.

`FrontEnd.admit` takes what a caller gave as `steering`, merges the server's default, resolves names, checks it against
what the engine serves, and returns the wire form that travels with the request. Nothing here imports vLLM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from trimtab.engines.vllm.config import SteeringSettings, model_sites
from trimtab.engines.vllm.registry import VectorRegistry, shared_directory
from trimtab.errors import SteeringError
from trimtab.program import PhaseProgram, ResolvedSteering
from trimtab.sites import HookPoint, ModelSites, Phase
from trimtab.spec import Steering

FIELD = "steering"  # the request's field, at every door

# Labels of the refusal counter: a fixed set, since field paths hold what callers wrote.
REASONS = frozenset({"interventions", "kind", "vector", "scale", "phase", "layers", "gate", "probe", "threshold"})
REASONS |= {"sharpness", "dtype", "shape", "layer_indices", "data", *HookPoint}
REASONS |= {"disabled", "beam_search", "resumable", "twice"}


class AdmittedWire(dict[str, Any]):
    """A wire form made by `FrontEnd.admit`; what a caller hands in never has this type. Not to be changed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdmittedWire":
        return self  # sampling parameters are cloned on their way, vectors need not be


@dataclass(frozen=True)
class Admission:
    """What admission made of a request: the form that travels on, and what the caller is told."""

    wire: AdmittedWire
    receipt: dict[str, Any]


class Observer(Protocol):
    """Counts what happens at the doors."""

    def steered(self) -> None: ...
    def refused(self, reason: str) -> None: ...


class FrontEnd:
    """The front end of one engine: its registry, its default spec, and the sites that it serves.

    Raises `SteeringError` if the default spec cannot be honoured, so that a server with such a default does not start.
    """

    def __init__(
        self, model: ModelSites, registry: VectorRegistry, default: Any = None, observer: Observer | None = None
    ) -> None:
        self.model = model
        self.registry = registry
        self.default = None if default is None else Steering.parse(default)
        self._observer = observer
        self._default_admission: tuple[Mapping[str, Any], Admission] | None = None
        if default is not None:
            self.admit(None, count=False)

    def admit(self, given: Any, *, count: bool = True) -> Admission | None:
        """Admit `given`: a `Steering`, a mapping or a JSON string, or None where the request says nothing.

        None if there is nothing to add, not even a default. Raises `SteeringError` whose field starts at the request's
        own `steering`.
        """
        if given is None and self.default is None:
            return None
        try:
            admission = self._admit_default() if given is None else self._admit(given)
        except SteeringError as error:
            where = f"{FIELD}.{error.field}" if error.field else FIELD
            self.refuse(error.field, count=count)
            raise SteeringError(where, error.message) from error
        if count and self._observer is not None:
            self._observer.steered()
        return admission

    def refuse(self, field: str, *, count: bool = True) -> None:
        """Count a refusal under the innermost known part of `field`."""
        if count and self._observer is not None:
            self._observer.refused(refusal_reason(field))

    def _admit_default(self) -> Admission:
        vectors = self.registry.vectors()
        if self._default_admission is None or self._default_admission[0] is not vectors:
            assert self.default is not None
            try:
                admission = self._finish(self.default, vectors)
            except SteeringError as error:
                # The operator's spec, not the caller's: say so, with the path in the operator's own file.
                raise SteeringError("", f"the server's default spec: {error}") from error
            self._default_admission = (vectors, admission)
            return admission
        return self._default_admission[1]

    def _admit(self, given: Any) -> Admission:
        steering = Steering.parse(given)
        vectors = self.registry.vectors()
        if self.default is None:
            return self._finish(steering, vectors)
        try:
            return self._finish(merge(self.default, steering), vectors)
        except SteeringError as error:
            steering.resolve(vectors, self.model)  # if the caller's part is at fault, name it by the caller's own path
            raise SteeringError("", f"together with the server's default spec: {error}") from error

    def _finish(self, steering: Steering, vectors: Mapping[str, Any]) -> Admission:
        resolved = steering.resolve(vectors, self.model)
        wire = AdmittedWire(self._inline_what_workers_lack(resolved).to_wire())
        return Admission(wire, receipt(resolved, default=self.default is not None))

    def _inline_what_workers_lack(self, resolved: ResolvedSteering) -> ResolvedSteering:
        return ResolvedSteering(*(self._inline(program) for program in (resolved.prefill, resolved.decode)))

    def _inline(self, program: PhaseProgram) -> PhaseProgram:
        held = self.registry.held_by_workers
        if all(term.reference is None or held(term.reference.digest) for term in program.terms):
            return program
        return replace(
            program,
            terms=tuple(
                term if term.reference is None or held(term.reference.digest) else replace(term, reference=None)
                for term in program.terms
            ),
        )


def build_front_end(vllm_config: Any) -> FrontEnd | None:
    """The front end of an engine with this configuration; None where steering is not configured.

    Raises `SteeringError` for bad settings, vector files or default spec.
    """
    from trimtab.engines.vllm.metrics import metrics

    settings = SteeringSettings.of(vllm_config)
    if settings is None:
        return None
    registry = VectorRegistry(settings.start_vectors, shared_directory())
    counters = metrics()
    counters.vectors(len(registry.vectors()))
    return FrontEnd(model_sites(vllm_config, settings), registry, settings.default, counters)


def merge(default: Steering, steering: Steering) -> Steering:
    """A request's spec on top of the server's: the default's interventions first, then the request's own."""
    return steering.model_copy(update={"interventions": (*default.interventions, *steering.interventions)})


def receipt(resolved: ResolvedSteering, *, default: bool = False) -> dict[str, Any]:
    """What a caller is told: the identity of each phase ("" = unsteered) and the content behind each vector used."""
    vectors: dict[str, str | None] = {}
    for program in (resolved.prefill, resolved.decode):
        for term in program.terms:
            digest = term.vector.digest if term.reference is None else term.reference.digest
            vectors.setdefault(digest.hex(), None if term.reference is None else term.reference.name)
    return {
        "prefill": resolved.identity(Phase.PREFILL),
        "decode": resolved.identity(Phase.DECODE),
        "vectors": [{"name": name, "digest": digest} for digest, name in vectors.items()],
        "server_default": default,
    }


def refusal_reason(field: str) -> str:
    """The innermost part of a field path that is one of `REASONS`, "other" if none is."""
    parts = re.split(r"[.\[\]]+", field)
    return next((part for part in reversed(parts) if part in REASONS), "other")
