"""The server's default: a spec that is added to every request, and what a request may do against it.

A default is binding unless its file says `"binding": false`: then no request may take back more than half of what it
adds, along its own direction (`serving.binding`). One that is not binding may be taken back in part or whole, and the
receipt says how much is left.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.errors import SteeringError
from trimtab.program import ResolvedSteering
from trimtab.serving.binding import LEAST_SHARE, Share, least_share
from trimtab.spec import Steering
from trimtab.wording import shown, summary


@dataclass(frozen=True)
class ServerDefault:
    """A default spec, and whether it is binding."""

    spec: Steering
    binding: bool = True

    @classmethod
    def parse(cls, given: Any) -> "ServerDefault":
        """The default in a server's settings: a spec, beside which `binding` may stand. Raises `SteeringError`."""
        if not isinstance(given, Mapping) or "binding" not in given:
            return cls._checked(Steering.parse(given), binding=True)
        if not isinstance(binding := given["binding"], bool):
            raise SteeringError("binding", f"got {shown(binding)}, want true or false")
        return cls._checked(Steering.parse({key: given[key] for key in given if key != "binding"}), binding)

    @classmethod
    def _checked(cls, spec: Steering, binding: bool) -> "ServerDefault":
        for index, step in enumerate(spec.interventions):
            if binding and step.schedule is not None:  # a request at full strength would outweigh what it fades to
                said = "cannot be in a default that is binding: what is left of it would change over the answer; "
                said += 'leave it out, or say "binding": false'
                raise SteeringError(f"interventions[{index}].schedule", said)
        return cls(spec, binding)

    @property
    def count(self) -> int:
        """How many interventions it has."""
        return len(self.spec.interventions)

    def shown(self) -> dict[str, Any]:
        """The default as the status route shows it."""
        return {**self.spec.model_dump(mode="json"), "binding": self.binding}

    def left_by(
        self, request: Steering, resolve: Callable[[Steering], ResolvedSteering], default: ResolvedSteering
    ) -> float:
        """The least share of this default, `default` once resolved, that a request leaves in force, at most 1.

        Raises `SteeringError` in the request's own terms where it is at fault, or leaves too little of a binding one.
        """
        if request.keep_norm and self.binding:
            said = "would keep norms at the sites of the server's default spec too, which is binding: leave it out"
            raise SteeringError("keep_norm", said)
        share = least_share(default, resolve(request))
        if request.keep_norm:
            return min(0.0, 0.0 if share is None else share.left)
        if share is None:
            return 1.0
        kept = share.keeps_the_promise or not self.binding
        if not kept and any(program.slots for program in default.programs_of(share.phase)):
            said = (
                "would act beside the server's default spec, which is binding and does more than add: what of that is "
                f"left cannot be measured on {share.phase.value} tokens; leave the interventions out, or have the "
                'default\'s file say "binding": false'
            )
            raise SteeringError("interventions", said)
        if not kept:
            raise self._refusal(request, resolve, default, share)
        return min(1.0, share.left)

    def _refusal(
        self,
        request: Steering,
        resolve: Callable[[Steering], ResolvedSteering],
        default: ResolvedSteering,
        share: Share,
    ) -> SteeringError:
        """Names the intervention that takes back most."""

        def alone(index: int) -> Steering:
            return request.model_copy(update={"interventions": request.interventions[index : index + 1]})

        def left(index: int) -> float:
            found = least_share(default, resolve(alone(index)))
            return 1.0 if found is None else found.left

        worst = min(range(len(request.interventions)), key=left)
        given = [source for step in self.spec.interventions for source in step.sources.values()]
        names = [source for source in given if isinstance(source, str)]
        named = f" ({summary(names)})" if names else ""
        least = f"{share.left:.2f}" if share.left > -10.0 else "less than -10"
        remedy = "lower the scale or leave the intervention out"
        if any(program.slots for program in resolve(alone(worst)).programs):
            remedy = "make its directions orthogonal to the default's, narrow its `layers`, or leave it out"
        return SteeringError(
            f"interventions[{worst}]",
            f"takes back too much of the server's default spec{named}, which is binding: {least} of what it "
            f"adds along its own direction would be left at {share.site} on {share.phase.value} tokens, and "
            f"{LEAST_SHARE} must be, gates and tokens counted where they take most; {remedy}",
        )


def merge(default: Steering, steering: Steering) -> Steering:
    """A request's spec on top of the server's: the default's interventions first, then the request's own.

    Norms are kept where either asks for it, and always where either wants that.
    """
    asked = default.keep_norm, steering.keep_norm
    update = {
        "interventions": (*default.interventions, *steering.interventions),
        "keep_norm": True if True in asked else asked[0] or asked[1],
    }
    return steering.model_copy(update=update)
