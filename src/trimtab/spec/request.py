"""What a request may ask for: the one validator behind every door, and the way from a spec to programs.

`Steering.parse` takes the object of a request in any of its forms and refuses what is wrong in form;
`Steering.resolve` looks names up, checks the rest against the model, and returns what the engines run. Both raise
`SteeringError`, whose path leads to the fault (`interventions[1].scale`) and whose message says what would be right.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.program import SPANS, Origin, PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import check_gate, check_served
from trimtab.sites import ModelSites, Phase
from trimtab.spec.base import Model, below, keys_are_text
from trimtab.spec.kinds import KINDS, Intervention
from trimtab.vectors.inline import MAX_INLINE_BYTES
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown, summary

MAX_INTERVENTIONS = 16
MAX_JSON_CHARACTERS = 96 << 20  # the numbers of MAX_INLINE_BYTES in decimal digits


class _ByKind:
    """Chooses the model of an intervention by its `kind`, for one kind as for many."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {str(model.model_fields["kind"].default): handler.generate_schema(model) for model in KINDS}
        by_kind = core_schema.tagged_union_schema(choices, discriminator="kind")

        def with_a_kind_in_words(value: Any) -> Any:
            keys_are_text(value)
            if isinstance(value, Mapping) and "kind" in value and not isinstance(value["kind"], str):
                said = f"got {shown(value['kind'])}, want a name; the kinds are {', '.join(choices)}"
                raise SteeringError("kind", said)
            return value

        return core_schema.no_info_before_validator_function(with_a_kind_in_words, by_kind)


class Steering(Model):
    """A request's steering: all of its interventions act on each token of their phase."""

    interventions: Annotated[
        tuple[Annotated[Intervention, _ByKind()], ...], Field(min_length=1, max_length=MAX_INTERVENTIONS)
    ]

    @model_validator(mode="after")
    def _inline_content_is_not_too_large(self) -> Self:
        total = sum(step.vector.block.nbytes for step in self.interventions if isinstance(step.vector, SteeringVector))
        gates = [step.gate for step in self.interventions if step.gate is not None]
        total += sum(gate.probe.vector.block.nbytes for gate in gates if isinstance(gate.probe, Probe))
        if total > MAX_INLINE_BYTES:
            limit = f"at most {MAX_INLINE_BYTES} may come with a request; register the vectors instead"
            raise SteeringError("interventions", f"the inline vectors take {total} bytes in float32: {limit}")
        return self

    @classmethod
    def parse(cls, spec: "Steering | Mapping[str, Any] | str | bytes") -> "Steering":
        """The spec in a request: a `Steering`, a mapping as in JSON, or a JSON text. Raises `SteeringError`."""
        if isinstance(spec, Steering):
            return spec
        if isinstance(spec, (str, bytes)):
            if len(spec) > MAX_JSON_CHARACTERS:
                said = f"the JSON text has {len(spec)} characters, at most {MAX_JSON_CHARACTERS} are read"
                raise SteeringError("", said)
            spec = read_json(spec)
        if not isinstance(spec, Mapping) or not all(isinstance(key, str) for key in spec):
            raise SteeringError("", f'got {type(spec).__name__}, want an object: {{"interventions": [...]}}')
        return cls(**spec)

    def resolve(
        self,
        vectors: Mapping[str, SteeringVector],
        model: ModelSites,
        probes: Mapping[str, Probe] | None = None,
    ) -> ResolvedSteering:
        """The programs that an engine serving `model` runs, names being looked up in `vectors` and `probes`.

        Raises `SteeringError` for unknown names, for sites and widths that the model does not have, for sums out of
        range, and for gates that the engine does not serve.
        """
        for index, step in enumerate(self.interventions):
            if step.gate is not None and not model.gates.count:  # before a look at names that no one can have given
                raise SteeringError(f"interventions[{index}].gate", "this engine serves no gates: leave the gate out")
        terms = self._terms(vectors, probes)
        for index, term in enumerate(terms):
            if term.vector.hidden_size != model.hidden_size or not model.sites.issuperset(term.vector.sites):
                raise _misfit(term, model, f"interventions[{index}].vector", inline=term.reference is None)
            if term.gate is not None:
                with below(f"interventions[{index}].gate"):
                    check_served(term.gate, term.vector.sites, model.gates)
        programs = self._programs(terms)
        resolved = ResolvedSteering(programs, *self._origins(programs, terms, vectors, probes or {}))
        resolved.check_gate_count(model.gates, "interventions")
        return resolved

    def identity(
        self,
        phase: Phase | str,
        vectors: Mapping[str, SteeringVector] | None = None,
        probes: Mapping[str, Probe] | None = None,
    ) -> str:
        """Hex digest of all that changes the KV of that phase's tokens; "" where the spec leaves them unsteered.

        In an engine with a monitor the identity of decode tokens is another: see `trimtab.program.monitor`.
        """
        return self._programs(self._terms(vectors or {}, probes))[SPANS.index(Phase(phase))].identity

    def _terms(self, vectors: Mapping[str, SteeringVector], probes: Mapping[str, Probe] | None) -> list[Term]:
        terms: list[Term] = []
        for index, step in enumerate(self.interventions):
            path = f"interventions[{index}]"
            term = step.term(vectors, path)
            if step.gate is not None:
                with below(f"{path}.gate"):
                    gate = step.gate.resolve(probes or {})
                    check_gate(gate, term.vector)
                term = replace(term, gate=gate)
            if terms and term.vector.hidden_size != terms[0].vector.hidden_size:
                widths = f"has width {term.vector.hidden_size}, but interventions[0] has {terms[0].vector.hidden_size}"
                raise SteeringError(f"{path}.vector", widths)
            terms.append(term)
        return terms

    def _programs(self, terms: list[Term]) -> tuple[PhaseProgram, ...]:
        made: dict[tuple[int, ...], PhaseProgram] = {}

        def program(phase: Phase) -> PhaseProgram:
            kept = tuple(index for index, step in enumerate(self.interventions) if step.phase in ("all", phase))
            if kept not in made:
                with below("interventions"):
                    made[kept] = PhaseProgram.of(terms[index] for index in kept)
            return made[kept]

        return tuple(map(program, SPANS))

    def _origins(
        self,
        programs: Iterable[PhaseProgram],
        terms: Iterable[Term],
        vectors: Mapping[str, SteeringVector],
        probes: Mapping[str, Probe],
    ) -> tuple[tuple[Origin, ...], tuple[Origin, ...]]:
        """Of the vectors and of the probes in `programs`: not of what other terms, or a scale of 0, have cancelled."""
        added = {vector.digest for program in programs for vector in program.vectors}
        read = {item.gate.probe.digest for program in programs for item in program.gated}
        used: dict[Origin, None] = {}
        decided: dict[Origin, None] = {}
        for step, term in zip(self.interventions, terms, strict=True):
            if term.vector.digest in added:
                used[_origin(step.vector, vectors)] = None
            if step.gate is not None and term.gate is not None and term.gate.probe.digest in read:
                decided[_origin(step.gate.probe, probes)] = None
        return tuple(used), tuple(decided)


def _origin(given: str | SteeringVector | Probe, names: Mapping[str, SteeringVector] | Mapping[str, Probe]) -> Origin:
    name, content = (given, names[given]) if isinstance(given, str) else (None, given)
    return Origin(name, content.digest, content.vector.digest if isinstance(content, Probe) else b"")


def _misfit(term: Term, model: ModelSites, path: str, *, inline: bool) -> SteeringError:
    vector = term.vector
    if vector.hidden_size != model.hidden_size:
        return SteeringError(path, f"has width {vector.hidden_size}, this model has hidden size {model.hidden_size}")
    site = next(site for site in vector.sites if site not in model.sites)
    here = f"{path}.{site.hook}" if inline else path
    remedy = "" if inline else "; `layers` narrows a vector"
    if site.layer >= model.num_layers:
        return SteeringError(
            here, f"layer {site.layer} does not exist: the layers are 0 to {model.num_layers - 1}{remedy}"
        )
    if site.hook not in model.hook_points:
        served = ", ".join(hook.value for hook in model.hook_points)
        return SteeringError(here, f"this model does not serve {site.hook}; it serves {served}")
    layers = sorted(other.layer for other in model.sites if other.hook == site.hook)
    return SteeringError(here, f"layer {site.layer} is not served at {site.hook}; served are {summary(layers)}{remedy}")
