"""What a request may ask for: the one validator behind every door, and the way from a spec to programs.

`Steering.parse` takes the object of a request in any of its forms and refuses what is wrong in form;
`Steering.resolve` looks names up, checks the rest against the model, and returns what the engines run. Both raise
`SteeringError`, whose path leads to the fault (`interventions[1].scale`) and whose message says what would be right.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from trimtab.errors import SteeringError
from trimtab.json_text import read_json
from trimtab.program import SPANS, PhaseProgram, ResolvedSteering, Slot, Term
from trimtab.program.joint_gate import check_gate, check_served
from trimtab.program.slot_checks import check_slot
from trimtab.sites import ModelSites, Phase, Site, SlotLimits, site_order
from trimtab.spec.base import Model, below, keys_are_text
from trimtab.spec.kinds import KINDS, Step
from trimtab.spec.kinds.intervention import Vectors
from trimtab.spec.made import Items, Made, behind_schedules
from trimtab.spec.places import MOST_PLACES, MOST_TEXTS, Range
from trimtab.spec.unplaced import Unplaced
from trimtab.vectors.inline import MAX_INLINE_BYTES
from trimtab.vectors.probe import Probe
from trimtab.vectors.vector import SteeringVector
from trimtab.wording import shown, summary

MAX_INTERVENTIONS = 16
OF_AN_INTERVENTION = frozenset(name for kind in KINDS for name in kind.model_fields)
"""Keys that an intervention of some kind may have."""
MAX_JSON_CHARACTERS = 96 << 20  # the numbers of MAX_INLINE_BYTES in decimal digits


def _kept(value: Any) -> Any:
    if not isinstance(value, bool) and value != "if_grown":
        raise SteeringError("", f'got {shown(value)}, want true, false or "if_grown"')
    return value


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

    interventions: Annotated[tuple[Annotated[Step, _ByKind()], ...], Field(min_length=1, max_length=MAX_INTERVENTIONS)]
    keep_norm: Annotated[Literal[False, True, "if_grown"], BeforeValidator(_kept)] = False

    @model_validator(mode="before")
    @classmethod
    def _keys_of_interventions_are_in_them(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for key in given:
                if key in OF_AN_INTERVENTION:
                    raise SteeringError(key, "belongs into an intervention: give it to each of `interventions`")
        return given

    @model_validator(mode="after")
    def _inline_content_is_not_too_large(self) -> Self:
        given = [source for step in self.interventions for source in step.sources.values()]
        total = sum(source.block.nbytes for source in given if isinstance(source, SteeringVector))
        gates = [gate for step in self.interventions for gate in step.gates.values()]
        total += sum(gate.probe.vector.block.nbytes for gate in gates if isinstance(gate.probe, Probe))
        if total > MAX_INLINE_BYTES:
            limit = f"at most {MAX_INLINE_BYTES} may come with a request; register the vectors instead"
            raise SteeringError("interventions", f"the inline vectors take {total} bytes in float32: {limit}")
        return self

    @model_validator(mode="after")
    def _places_are_not_too_many(self) -> Self:
        wheres = [step.where for step in self.interventions if step.where is not None]
        places = [place for where in wheres for place in where.all_places]
        texts = sum(not isinstance(place, Range) for place in places)
        for what, found, most in (("ranges", len(places), MOST_PLACES), ("texts and roles", texts, MOST_TEXTS)):
            if found > most:
                said = f"have {found} {what} in all their `where`, at most {most} are served with one request"
                raise SteeringError("interventions", said)
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
        *,
        defaults: int = 0,
        norms: Mapping[Site, float] | None = None,
    ) -> ResolvedSteering | Unplaced:
        """The programs that an engine serving `model` runs, names being looked up in `vectors` and `probes`.

        Where an intervention says `where` it acts, or has a `schedule`, they wait for a prompt.

        The first `defaults` of the interventions are those of a server's default: where slots clash, the fault says so.
        `norms` are the stream's median norms, for doses of vectors whose metadata do not have them.
        Raises `SteeringError` for unknown names, for sites and widths that the model does not have, for sums out of
        range, for slots that clash, and for kinds and gates that the engine does not serve.
        """
        for index, step in enumerate(self.interventions):  # before a look at names that no one can have given
            if step.gate is not None and not model.gates.count:
                raise SteeringError(f"interventions[{index}].gate", "this engine serves no gates: leave the gate out")
            if step.needs and step.needs not in model.slots.kinds:
                field = "unit" if step.needs != step.kind else "kind"
                raise SteeringError(f"interventions[{index}].{field}", _undeclared(step.needs, model.slots))
        if self.keep_norm and "keep_norm" not in model.slots.kinds:
            raise SteeringError("keep_norm", _undeclared("keep_norm", model.slots))
        lowered = self._lowered(Vectors(vectors, norms or {}), probes, defaults)
        for index, items in enumerate(lowered):
            for item in items:
                self._check_sites(index, item, model)
                if item.gate is not None:
                    with below(f"interventions[{index}].gate"):
                        check_served(item.gate, item.sites, model.gates)
        timed = behind_schedules(self.interventions, lowered, model.gates)
        made = Made(self.interventions, lowered, timed, self.keep_norm, vectors, probes or {})
        if any(step.is_placed for step in self.interventions):
            return Unplaced(made, model, defaults)
        programs = self._programs(made)
        for program in programs:
            made.check_kept(program, model)
        resolved = ResolvedSteering(programs, *made.origins(programs), made.asked(defaults))
        resolved.check_gate_count(model.gates, "interventions")
        resolved.check_slot_count(model.slots, "interventions")
        return resolved

    def identity(
        self,
        phase: Phase | str,
        vectors: Mapping[str, SteeringVector] | None = None,
        probes: Mapping[str, Probe] | None = None,
        norms: Mapping[Site, float] | None = None,
    ) -> str:
        """Hex digest of all that changes the KV of that phase's tokens; "" where the spec leaves them unsteered.

        In an engine with a monitor the identity of decode tokens is another: see `trimtab.program.monitor`.
        """
        for index, step in enumerate(self.interventions):
            if step.is_placed:
                said = "is known with a prompt alone: ask for the identity of what `resolve(...).placed(prompt)` gives"
                field = "schedule" if step.where is None else "where"
                raise SteeringError(f"interventions[{index}].{field}", said)
        lowered = self._lowered(Vectors(vectors or {}, norms or {}), probes)
        made = Made(self.interventions, lowered, lowered, self.keep_norm, vectors or {}, probes or {})
        return self._programs(made)[SPANS.index(Phase(phase))].identity

    def _lowered(self, vectors: Vectors, probes: Mapping[str, Probe] | None, defaults: int = 0) -> tuple[Items, ...]:
        """What each intervention comes down to."""
        lowered: list[Items] = []
        width: int | None = None
        for index, step in enumerate(self.interventions):
            path = f"interventions[{index}]"
            items = step.lower(vectors, path)
            for slot in (item for item in items if isinstance(item, Slot)):
                _check_slot(slot, step, path)
            for item in items:
                width = item.hidden_size if width is None else width
                if item.hidden_size != width:
                    said = f"has width {item.hidden_size}, but interventions[0] has {width}"
                    raise SteeringError(f"{path}.{_principal(step)}", said)
            if step.gate is not None:
                with below(f"{path}.gate"):
                    gate = step.gate.resolve(probes or {})
                    for item in items:
                        check_gate(gate, item.sites, item.hidden_size)
                items = tuple(replace(item, gate=gate) for item in items)
            told = f"the default's {path}" if index < defaults else f"interventions[{index - defaults}]"
            own = {"asked_by": frozenset((index,))}
            called = own | {"kind": step.kind, "path": told}
            lowered.append(tuple(replace(item, **(called if isinstance(item, Slot) else own)) for item in items))
        return tuple(lowered)

    def _check_sites(self, index: int, item: Term | Slot, model: ModelSites) -> None:
        """Raise `SteeringError` where the model, or its slots, do not have what an intervention acts on."""
        step, path = self.interventions[index], f"interventions[{index}]"
        if item.hidden_size != model.hidden_size:
            said = f"has width {item.hidden_size}, this model has hidden size {model.hidden_size}"
            raise SteeringError(f"{path}.{_principal(step)}", said)
        if (site := next((site for site in item.sites if site not in model.sites), None)) is not None:
            raise _misfit(site, model, step, path)
        if isinstance(item, Slot):
            outside = [site for site in item.sites if site not in model.slots.sites]
            if outside:
                served = summary([str(site) for site in sorted(model.slots.sites, key=site_order)])
                said = f"acts at {outside[0]}, where this engine has no slots, which `{step.kind}` needs: they are at "
                said += f"{served}; narrow it with `layers`, or start the engine with more --steering-slot-layers"
                raise SteeringError(f"{path}.{_principal(step)}", said)

    def _programs(self, made: Made) -> tuple[PhaseProgram, ...]:
        """What is done in each phase."""
        steps = self.interventions
        return tuple(
            made.program(tuple(index for index, step in enumerate(steps) if step.phase in ("all", phase)))
            for phase in SPANS
        )


def _check_slot(slot: Slot, step: Step, path: str) -> None:
    """Raise `SteeringError` for a slot that no process would read: mostly at the field of the number's name."""
    try:
        check_slot(slot)
    except SteeringError as error:
        if error.field in type(step).model_fields or not error.field:
            raise SteeringError(f"{path}{error.field and '.'}{error.field}", error.message) from None
        raise SteeringError(path, f"the number `{error.field}` of its slot: {error.message}") from None


def _undeclared(kind: str, limits: SlotLimits) -> str:
    if not limits.count:
        return f"this engine does not serve `{kind}`: start it with --steering-slots 1, and {kind} in --steering-kinds"
    declared = ", ".join(sorted(limits.kinds))
    return f"this engine does not serve `{kind}`, which it was not started for: add it to --steering-kinds ({declared})"


def _principal(step: Step) -> str:
    """The field of the vector that says where an intervention acts."""
    return next(iter(step.sources))


def _misfit(site: Site, model: ModelSites, step: Step, path: str) -> SteeringError:
    """The fault of an intervention that acts at `site`, which is not served."""
    field = _principal(step)
    inline = isinstance(step.sources[field], SteeringVector)
    here = f"{path}.{field}.{site.hook}" if inline else f"{path}.{field}"
    by_layer = here if step.layers is None else f"{path}.layers"
    by_hook = here if step.hooks is None else f"{path}.hooks"
    remedy = "" if inline or step.layers is not None else "; `layers` narrows a vector"
    if site.layer >= model.num_layers:
        said = f"layer {site.layer} does not exist: the layers are 0 to {model.num_layers - 1}{remedy}"
        return SteeringError(by_layer, said)
    if site.hook not in model.hook_points:
        served = ", ".join(hook.value for hook in model.hook_points)
        return SteeringError(by_hook, f"this model does not serve {site.hook}; it serves {served}")
    layers = sorted(other.layer for other in model.sites if other.hook == site.hook)
    said = f"layer {site.layer} is not served at {site.hook}; served are {summary(layers)}{remedy}"
    return SteeringError(by_layer, said)
