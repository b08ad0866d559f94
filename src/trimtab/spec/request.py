"""What a request may ask for: the one validator behind every door, and the way from a spec to programs.

`Steering.parse` takes the object of a request in any of its forms and refuses what is wrong in form;
`Steering.resolve` looks names up, checks the rest against the model, and returns what the engines run. Both raise
`SteeringError`, whose path leads to the fault (`interventions[1].scale`) and whose message says what would be right.

A new kind of intervention is a subclass of `Intervention` here, listed in `KINDS`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.program import PhaseProgram, ResolvedSteering, Term, fault_of_range
from trimtab.program.gates import ResolvedGate, VectorReference, check_gate, check_served
from trimtab.sites import ModelSites, Phase
from trimtab.spec.faults import join, translate
from trimtab.spec.fields import Layers, Number, ProbeSource, Source
from trimtab.vectors.inline import MAX_INLINE_BYTES
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown, summary, with_suggestions

MAX_INTERVENTIONS = 16
MAX_JSON_CHARACTERS = 96 << 20  # the numbers of MAX_INLINE_BYTES in decimal digits


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    def __init__(self, /, **data: Any) -> None:  # by position alone: a caller's object may have any key, "self" too
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise translate(error, type(self)) from None


def _keys_are_text(value: Any) -> Any:
    """An object within a spec is handed to its model key by key, which works for text alone."""
    if isinstance(value, Mapping) and (other := [key for key in value if not isinstance(key, str)]):
        raise SteeringError("", f"has the key {shown(other[0])}, a {type(other[0]).__name__}; keys are text")
    return value


class Gate(_Model):
    """The factor of one intervention per token: `sigmoid(sharpness * (score - threshold))`.

    The score is `x . direction + bias` of `probe`, x being the residual stream before any steering at the probe's site;
    `probe` is a registered name, a `Probe`, or an inline direction at one site, beside which a `"bias"` may stand.
    `hard` makes the factor 1 where the score is above the threshold and 0 elsewhere, `invert` turns it into one minus
    itself.
    """

    probe: ProbeSource
    threshold: Number
    sharpness: Number = 1.0
    invert: Annotated[bool, Field(strict=True)] = False
    hard: Annotated[bool, Field(strict=True)] = False
    _label: str = PrivateAttr("")  # the name that stood where the probe stands, if one did

    @model_validator(mode="after")
    def _sharpness_means_something(self) -> Self:
        if self.sharpness <= 0:
            raise SteeringError("sharpness", f"got {self.sharpness}, want a number above 0; `invert` reverses a gate")
        if self.hard and "sharpness" in self.model_fields_set:
            raise SteeringError("sharpness", "has no effect on a hard gate: leave it out")
        return self

    def with_content(self, probe: Probe) -> Self:
        """The same gate with `probe` in the place of its name, under which reports go on telling of it."""
        gate = self.model_copy(update={"probe": probe})
        gate._label = self.probe if isinstance(self.probe, str) else self._label
        return gate

    def resolve(self, probes: Mapping[str, Probe]) -> ResolvedGate:
        """The gate with its probe looked up in `probes`. Raises `SteeringError` below the gate."""
        reference: VectorReference | None = None
        label = self._label
        if isinstance(self.probe, Probe):
            probe = self.probe
        elif (found := probes.get(self.probe)) is None:
            known = f"registered are {summary(sorted(probes))}" if probes else "no probe is registered"
            hint = with_suggestions(self.probe, probes)
            raise SteeringError("probe", f"there is no probe {self.probe!r}{hint}; {known}")
        else:
            probe, reference, label = found, VectorReference(self.probe, found.vector.digest), self.probe
        sharpness = None if self.hard else self.sharpness
        return ResolvedGate.of(probe.vector, self.threshold - probe.bias, sharpness, self.invert, reference, label)


class Intervention(_Model):
    """What every kind of intervention says. `kind` tells them apart; each subclass fixes it."""

    kind: str
    vector: Source
    phase: Literal["all", "prefill", "decode"] = "all"
    layers: Layers | None = None
    gate: Annotated[Gate | None, BeforeValidator(_keys_are_text)] = None

    def term(self, vectors: Mapping[str, SteeringVector], path: str) -> Term:
        """What this intervention adds; each kind has its own. Raises `SteeringError` below `path`."""
        raise NotImplementedError

    def narrowed_vector(
        self, vectors: Mapping[str, SteeringVector], path: str
    ) -> tuple[SteeringVector, VectorReference | None]:
        """The vector at `layers` alone, and the reference by which another process can be told of it."""
        reference: VectorReference | None = None
        if isinstance(self.vector, SteeringVector):
            vector = self.vector
        elif (found := vectors.get(self.vector)) is None:
            known = f"registered are {summary(sorted(vectors))}" if vectors else "no vector is registered"
            hint = with_suggestions(self.vector, vectors)
            raise SteeringError(f"{path}.vector", f"there is no vector {self.vector!r}{hint}; {known}")
        else:
            vector = found
            reference = VectorReference(self.vector, vector.digest, self.layers)
        if self.layers is None:
            return vector, reference
        try:
            return vector.at(self.layers), reference
        except SteeringError as error:
            raise SteeringError(f"{path}.layers", error.message) from None


class Add(Intervention):
    """Adds `scale` times the vector to the stream, at each of the vector's sites."""

    kind: Literal["add"] = "add"
    scale: Number = 1.0

    def term(self, vectors: Mapping[str, SteeringVector], path: str) -> Term:
        """The vector and its scale. Raises `SteeringError` for an unknown name or layer, values out of range."""
        vector, reference = self.narrowed_vector(vectors, path)
        value = vector.max_abs * abs(self.scale)
        if vector.max_abs and self.scale and (fault := fault_of_range(value)) is not None:
            by_scale = abs(self.scale) > 1.0 if value > 1.0 else abs(self.scale) < 1.0
            raise SteeringError(f"{path}.{'scale' if by_scale else 'vector'}", fault)
        return Term(vector, self.scale, reference)


KINDS: tuple[type[Intervention], ...] = (Add,)


class _ByKind:
    """Chooses the model of an intervention by its `kind`, for one kind as for many."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {str(model.model_fields["kind"].default): handler.generate_schema(model) for model in KINDS}
        by_kind = core_schema.tagged_union_schema(choices, discriminator="kind")

        def with_a_kind_in_words(value: Any) -> Any:
            _keys_are_text(value)
            if isinstance(value, Mapping) and "kind" in value and not isinstance(value["kind"], str):
                said = f"got {shown(value['kind'])}, want a name; the kinds are {', '.join(choices)}"
                raise SteeringError("kind", said)
            return value

        return core_schema.no_info_before_validator_function(with_a_kind_in_words, by_kind)


class Steering(_Model):
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
                with _below(f"interventions[{index}].gate"):
                    check_served(term.gate, term.vector.sites, model.gates)
        resolved = self._programs(terms, model.monitor)
        resolved.check_gate_count(model.gates, "interventions")
        return resolved

    def identity(
        self,
        phase: Phase | str,
        vectors: Mapping[str, SteeringVector] | None = None,
        probes: Mapping[str, Probe] | None = None,
    ) -> str:
        """Hex digest of all that changes the KV of that phase's tokens; "" where the spec leaves them unsteered.

        In an engine with a monitor the identity of decode tokens is another: see `ResolvedSteering.identity`.
        """
        return self._programs(self._terms(vectors or {}, probes)).identity(Phase(phase))

    def _terms(self, vectors: Mapping[str, SteeringVector], probes: Mapping[str, Probe] | None) -> list[Term]:
        terms: list[Term] = []
        for index, step in enumerate(self.interventions):
            path = f"interventions[{index}]"
            term = step.term(vectors, path)
            if step.gate is not None:
                with _below(f"{path}.gate"):
                    gate = step.gate.resolve(probes or {})
                    check_gate(gate, term.vector)
                term = replace(term, gate=gate)
            if terms and term.vector.hidden_size != terms[0].vector.hidden_size:
                widths = f"has width {term.vector.hidden_size}, but interventions[0] has {terms[0].vector.hidden_size}"
                raise SteeringError(f"{path}.vector", widths)
            terms.append(term)
        return terms

    def _programs(self, terms: list[Term], monitor: str = "") -> ResolvedSteering:
        def program(left_out: str) -> PhaseProgram:
            kept = [term for term, step in zip(terms, self.interventions, strict=True) if step.phase != left_out]
            with _below("interventions"):
                return PhaseProgram.of(kept)

        prefill = program("decode")
        same = all(step.phase == "all" for step in self.interventions)
        return ResolvedSteering(prefill, prefill if same else program("prefill"), monitor)


@contextmanager
def _below(path: str) -> Iterator[None]:
    try:
        yield
    except SteeringError as error:
        raise SteeringError(join(path, error.field), error.message) from None


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
