"""What the host knows of a site without asking the device: whether it rests, and what was warmed there.

A launch costs the host tens of microseconds, in eager execution more than the work on the device. Whoever plans a
forward pass knows which sites nothing will change in it, so `emit` can pass them by.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from trimtab.sites import HookPoint


class SiteState:
    """One site's state in this process. It is shared by the site's module and by whoever plans its passes."""

    __slots__ = ("resting", "warmed")

    def __init__(self) -> None:
        self.resting = False  # nothing at this site changes a token of the coming pass; False where nobody plans
        self.warmed: Counter[str] = Counter()  # launches in warm-up, by kernel


def set_site_state(module: nn.Module, hook: HookPoint, state: SiteState) -> None:
    """Let `module` know the state of its site at `hook`."""
    setattr(module, _NAMES[hook], state)


def site_state(module: nn.Module, hook: HookPoint) -> SiteState:
    """The state of `module`'s site at `hook`, which it has wherever it has steering buffers."""
    state: SiteState = getattr(module, _NAMES[hook])
    return state


def rests(module: nn.Module, hook: HookPoint) -> bool:
    """Whether `module` has a site at `hook`, and it rests. All that an idle site costs in eager execution."""
    state: SiteState | None = module.__dict__.get(_NAMES[hook])
    return state is not None and state.resting


@contextmanager
def awake(states: Sequence[SiteState]) -> Iterator[None]:
    """Let no site rest while buffers hold what nobody planned; afterwards each does as before."""
    before = [state.resting for state in states]
    try:
        for state in states:
            state.resting = False
        yield
    finally:
        for state, rested in zip(states, before, strict=True):
            state.resting = rested


_NAMES = {hook: f"_steering_{hook.value}_state" for hook in HookPoint}
