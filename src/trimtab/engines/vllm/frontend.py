"""Admission: the one validator behind every door through which a request can reach the engine.

`FrontEnd.admit` takes what a caller gave as `steering`, merges the server's default, resolves names, checks it against
what the engine serves, and returns the wire form that travels with the request. Nothing here imports vLLM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from trimtab.engines.vllm.config import SteeringSettings, model_sites
from trimtab.engines.vllm.registry import VectorRegistry, shared_directory
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.sites import HookPoint, ModelSites, Phase
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

FIELD = "steering"  # the request's field, at every door

# Labels of the refusal counter: a fixed set, since field paths hold what callers wrote.
REASONS = frozenset({"interventions", "kind", "vector", "scale", "phase", "layers", "gate", "probe", "threshold"})
REASONS |= {"sharpness", "dtype", "shape", "layer_indices", "data", *HookPoint}
REASONS |= {"disabled", "beam_search", "resumable", "twice"}


RECENT = 1024  # admissions kept: a front end sees the same few specs of names again and again


class AdmittedWire(dict[str, Any]):
    """A wire form made by `FrontEnd.admit`; what a caller hands in never has this type. Not to be changed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdmittedWire":
        return self  # sampling parameters are cloned on their way, vectors need not be

    def __repr__(self) -> str:
        return f"<steering with {len(self['vectors'])} vectors>"  # logs of requests print sampling parameters


@dataclass(frozen=True)
class Admission:
    """What admission made of a request: the form that travels on, and from what it was made."""

    wire: AdmittedWire
    resolved: ResolvedSteering
    spec: Steering
    vectors: Mapping[str, SteeringVector]
    server_default: bool

    @cached_property
    def receipt(self) -> dict[str, Any]:
        """What the caller is told, in JSON's types: the identity of each phase ("" = unsteered), the sites, the content
        behind each vector used, and whether the server's default is in it. Made when asked for.
        """
        used: dict[tuple[str | None, str], None] = {}
        for step in self.spec.interventions:
            name, vector = (
                (step.vector, self.vectors[step.vector]) if isinstance(step.vector, str) else (None, step.vector)
            )
            used[name, vector.digest.hex()] = None
        return {
            "identity": {phase.value: self.resolved.identity(phase) for phase in Phase},
            "sites": [str(site) for site in self.resolved.sites],
            "vectors": [{"name": name, "digest": digest} for name, digest in used],
            "server_default": self.server_default,
        }


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
        # Admissions of specs that consist of names, and the mapping under which the names had their meaning.
        self._recent: tuple[Mapping[str, SteeringVector], dict[Steering, Admission]] = ({}, {})
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

    def _finish(self, steering: Steering, vectors: Mapping[str, SteeringVector]) -> Admission:
        under, known = self._recent  # read once: admissions run in several threads
        if under is not vectors:
            known = {}
            self._recent = (vectors, known)
        if (admission := known.get(steering)) is not None:
            return admission
        carried = self._carrying_what_workers_lack(steering, vectors)
        resolved = carried.resolve(vectors, self.model)
        wire = AdmittedWire(resolved.to_wire())
        admission = Admission(wire, resolved, steering, vectors, self.default is not None)
        if all(isinstance(step.vector, str) for step in carried.interventions):  # else it holds content: not worth it
            if len(known) >= RECENT:
                known.pop(next(iter(known)), None)
            known[steering] = admission
        return admission

    def _carrying_what_workers_lack(self, steering: Steering, vectors: Mapping[str, SteeringVector]) -> Steering:
        """The same spec with each name replaced by its content where workers do not hold it from start."""

        def content(name: Any) -> Any:
            vector = vectors.get(name) if isinstance(name, str) else None
            return name if vector is None or self.registry.held_by_workers(vector.digest) else vector

        if all(content(step.vector) is step.vector for step in steering.interventions):
            return steering
        steps = tuple(step.model_copy(update={"vector": content(step.vector)}) for step in steering.interventions)
        return steering.model_copy(update={"interventions": steps})


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


def refusal_reason(field: str) -> str:
    """The innermost part of a field path that is one of `REASONS`, "other" if none is."""
    parts = re.split(r"[.\[\]]+", field)
    return next((part for part in reversed(parts) if part in REASONS), "other")
