"""Steering as it travels inside a request: from the front end to the engine core, and on to every worker.

`SamplingParams.extra_args["steering"]` holds a `Carried`: the form that `trimtab.program.codec` makes for other
processes, with the resolved steering at hand for this one. Whoever serialises it sees a plain dict. What comes from
another process is a plain dict and is not trusted: the engine core reads it once, when the request arrives, and puts a
`Carried` of its own in its place, for block keys and for a worker in the core's process.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Self

from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.engines.vllm.settings.slots import check_slots
from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.program.codec import decode
from trimtab.program.monitor import reaches
from trimtab.program.resolved_gate import VectorReference
from trimtab.program.room import check_room
from trimtab.recent import Recent
from trimtab.serving.interventions import slots_of
from trimtab.serving.memo import key_of
from trimtab.serving.receipt import receipt_of
from trimtab.sites import ModelSites
from trimtab.vectors.vector import SteeringVector

# In `extra_args` of each request of a steered engine whose front end looked for steering in it, found or not. A front
# end that never loaded trimtab drops a request's `steering` without a word: the core refuses what lacks the mark.
MARK = "trimtab_admitted"

TICKET = "trimtab_ticket"  # beside the steering in `extra_args`: {"answer": the name of an `accounts.Account`}
_LONGEST_NAME = 64  # characters


class Carried(dict[str, Any]):
    """The form of steering for other processes, with what it stands for; not to be changed. Pickles as the plain dict.

    Made by the front end of this process from what it admitted, or by its engine core from what it read; what a caller
    or another process hands in never has this type. `default_left` is what the receipt says of the server's default.
    """

    steering: ResolvedSteering
    default_left: float | None
    # By which engine core of this process it was checked last. A spec of names comes again and again.
    taken: tuple[SteeringSettings, ModelSites] | None = None

    def __init__(
        self, encoded: Mapping[str, Any], steering: ResolvedSteering, default_left: float | None = None
    ) -> None:
        super().__init__(encoded)
        self.steering, self.default_left = steering, default_left

    @cached_property
    def receipt(self) -> dict[str, Any]:
        """The receipt of an answer that has no tokens yet, in JSON's types; for reading."""
        return receipt_of(self.steering, default_left=self.default_left).as_json()

    @cached_property
    def slots(self) -> list[set[tuple[str, str]]]:
        """The slots of each intervention, of which workers tell by phase and digest; for reading."""
        return slots_of(self.steering)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({**self, "vectors": [_copied(vector) for vector in self["vectors"]]},)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # clones of sampling parameters may share it

    def __repr__(self) -> str:
        return f"<steering with {len(self['vectors'])} vectors>"  # logs of requests print sampling parameters


Decoded = Recent[ResolvedSteering]  # what one engine read in forms that hold little but names


def carried(sampling_params: Any) -> Any:
    """What a request carries as steering, in whatever form; None if nothing."""
    extra = getattr(sampling_params, "extra_args", None)
    return extra.get(SETTINGS_KEY) if extra else None


def checked(given: Any, settings: SteeringSettings, model: ModelSites, recent: Decoded | None = None) -> Carried:
    """What a request carries, read and checked against what the engine serves.

    `recent` is what this engine read before. Raises `SteeringError`.
    """
    if isinstance(given, Carried):
        if (taken := given.taken) is not None and taken[0] is settings and taken[1] is model:
            return given
        if _is_at_home(given, settings):
            _check_served(given.steering, model)  # its content was read and named in this process: not again
            given.taken = settings, model
            return given
    key = None if recent is None else key_of(given)
    if recent is not None and (known := recent.get(key)) is not None:
        return Carried(given, known)
    steering = decode(given, settings.start_vectors_by_digest)
    _check_served(steering, model)
    if recent is not None:
        recent.put(key, steering, held_bytes(steering))
    return Carried(given, steering)


def steering_of(
    sampling_params: Any, settings: SteeringSettings, recent: Decoded | None = None
) -> ResolvedSteering | None:
    """The steering of a request that the engine core has checked; None if it carries none.

    `recent` is what this process read before.
    """
    given = carried(sampling_params)
    if given is None or isinstance(given, Carried):
        return None if given is None else given.steering
    key = None if recent is None else key_of(given)
    if recent is not None and (known := recent.get(key)) is not None:
        return known
    steering = decode(given, settings.start_vectors_by_digest)
    if recent is not None and key is not None:
        recent.put(key, steering, held_bytes(steering))
    return steering


def owner_of(sampling_params: Any, request_id: str) -> str:
    """The name under which a worker reports a request: that on its ticket, or for one that passed no door of ours its
    own id, as a digest: ids may be of any length."""
    extra = getattr(sampling_params, "extra_args", None)
    ticket = extra.get(TICKET) if extra else None
    name = ticket.get("answer") if isinstance(ticket, dict) else None
    if isinstance(name, str) and len(name) <= _LONGEST_NAME:
        return name
    return hashlib.sha256(request_id.encode(errors="replace")).hexdigest()


def held_bytes(steering: ResolvedSteering) -> int:
    """Bytes that the vectors in `steering` keep which are not registered ones, but content or some layers of them.

    A part of a vector keeps all of it.
    """
    kept = {}
    for vector, reference in _vectors(steering):
        if reference is None or reference.layers is not None or reference.hooks is not None:
            kept[id(vector.whole)] = vector.whole.nbytes
    return sum(kept.values())


def _vectors(steering: ResolvedSteering) -> Iterator[tuple[SteeringVector, VectorReference | None]]:
    """Every vector that is added, read or written along, and how it can be told of."""
    yield from ((term.vector, term.reference) for term in steering.terms)
    for direction in (direction for slot in steering.slots for direction in slot.directions):
        references = direction.references or (None,) * len(direction.parts)
        yield from ((part.vector, reference) for part, reference in zip(direction.parts, references, strict=True))


def _copied(vector: dict[str, Any]) -> dict[str, Any]:
    return vector | {"data": bytes(vector["data"])} if "data" in vector else vector


def _is_at_home(given: Carried, settings: SteeringSettings) -> bool:
    """Whether an engine of this process may take over `given` as it is: another's has its own names."""
    known = settings.start_vectors_by_digest
    named = [vector["digest"] for vector in given["vectors"] if "digest" in vector]
    return all(digest in known for digest in named)


def _check_served(steering: ResolvedSteering, model: ModelSites) -> None:
    if not model.sites.issuperset(steering.sites):
        missing = next(site for site in steering.sites if site not in model.sites)
        raise SteeringError(SETTINGS_KEY, f"{missing} is not served by this engine")
    monitor = model.gates.monitor
    if monitor is not None and reaches(steering, monitor.site):
        raise SteeringError(
            SETTINGS_KEY, "was admitted without this engine's monitor: give the front end the same steering settings"
        )
    steering.check_gates(model.gates, SETTINGS_KEY)
    check_room(steering, model.room, SETTINGS_KEY)
    check_slots(steering.programs, model.slots, SETTINGS_KEY)
    for vector, _ in _vectors(steering):
        if vector.hidden_size != model.hidden_size:
            raise SteeringError(
                SETTINGS_KEY, f"a vector of width {vector.hidden_size}; the model's is {model.hidden_size}"
            )
