"""Steering that says where it acts, from its admission until its prompt is known.

What is admitted before vLLM has rendered a prompt is checked as far as that goes without one. It is placed on each
prompt of its request by itself, by whoever comes first of those that see it: the engine's client, while a refusal is
still an HTTP 400, else the input processor.
"""

from collections.abc import Callable
from typing import Any, Self

from trimtab.engines.vllm.carried import Carried
from trimtab.spec.places import RolePlace
from trimtab.spec.prompt_tokens import PromptTokens
from trimtab.spec.unplaced import Unplaced

NO_CHAT = "the server that answers gets token ids and no messages, which have roles: give ranges or texts instead"


class Pending(dict[str, Any]):
    """Admitted steering in place of what travels; not to be changed. No other process can read it."""

    def __init__(self, unplaced: Unplaced, place: Callable[[PromptTokens], Carried]) -> None:
        super().__init__(placed=False)
        self.unplaced = unplaced
        self.place = place  # raises `SteeringError` whose field starts at the request's own `steering`

    @property
    def role(self) -> str | None:
        """Where the request asks for a role, within its `steering`; None if it does not."""
        unplaced = self.unplaced
        for index, step in enumerate(unplaced.made.steps[unplaced.defaults :]):
            for field, place in () if step.where is None else step.where.all_in_prompt:
                if isinstance(place, RolePlace):
                    return f"interventions[{index}].where.{field}.role"
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # clones of sampling parameters may share it

    def __repr__(self) -> str:
        return "<steering whose prompt is not known yet>"  # logs of requests print sampling parameters
