"""What a kind comes down to can be computed and sent: anything else is refused where the intervention stands."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinds_cases import HERE, resolve, vector
from trimtab.errors import SteeringError
from trimtab.program import Direction, Numbers, ResolvedSteering, Slot
from trimtab.program.codec import decode, encode
from trimtab.program.slots import Part
from trimtab.responses import RESPONSES, Response
from trimtab.sites import HookPoint, Site
from trimtab.spec.kinds.ablate import Ablate

V = vector(1, (HERE, Site(4, HookPoint.MLP_IN)))
WAY = Direction((Part(V),))
NARROW = Direction((Part(vector(2)),))
ONE = Numbers.of(0.0, 1.0, 0.0, 0.0)
EVERYWHERE = tuple((site, ONE) for site in V.sites)
SLOT = Slot("clip", WAY, None, EVERYWHERE)


@pytest.fixture
def lowering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Resolves an ablation as if its kind came down to the given slot."""

    def resolved(slot: Slot) -> ResolvedSteering:
        monkeypatch.setattr(Ablate, "lower", lambda self, vectors, path: (slot,))
        return resolve({"kind": "add", "vector": V}, {"kind": "ablate", "vector": V})

    return resolved


def clip(*numbers: float) -> Slot:
    return replace(SLOT, numbers=tuple((site, Numbers.of(*numbers)) for site in V.sites))


INFINITY = math.inf
REFUSED: dict[str, tuple[Slot, str, str]] = {
    "a number beyond every dtype": (clip(0.0, 1e6, 0.0, 0.0), ".strength", "got 1e+06, want a number up to 65504"),
    "a number of no field": (clip(0.0, 1.0, -1e6, 0.0), "", "the number `low` of its slot: got -1e+06, want"),
    "NaN": (clip(0.0, math.nan, 0.0, 0.0), ".strength", "got nan"),
    "an infinite bias": (clip(INFINITY, 1.0, 0.0, 0.0), "", "the number `bias` of its slot: got inf"),
    "bounds that hold nothing": (clip(0.0, 1.0, INFINITY, INFINITY), "", "the bounds inf and inf of a clip hold"),
    "no bias": (clip(1.0, 0.0, 0.0), "", "3 numbers; those of a clip are bias, strength, low, high"),
    "not rounded": (replace(SLOT, numbers=((HERE, Numbers(0.0, (0.1, 0.0, 0.0))),)), "", "`Numbers.of` rounds them"),
    "sites out of order": (replace(SLOT, numbers=EVERYWHERE[::-1]), "", "sites out of order"),
    "a site twice": (replace(SLOT, numbers=EVERYWHERE[:1] * 2), "", "sites out of order, or one of them twice"),
    "no site": (replace(SLOT, numbers=()), "", "names no site"),
    "a site without direction": (replace(SLOT, read=NARROW), "", "acts at mlp_in:4, where its direction has no site"),
    "no direction": (replace(SLOT, read=None), "", "neither reads nor writes"),
    "no such response": (replace(SLOT, response="soften"), "", "the response 'soften', want one of clip, turn"),
    "a zero direction": (replace(SLOT, read=Direction((Part(V, 0.0),))), "", "a direction that is zero at"),
    "a huge weight": (replace(SLOT, read=Direction((Part(V, 1e9),))), "", "got the weight 1e+09"),
    "a direction of nine": (replace(SLOT, read=Direction((Part(V),) * 9)), "", "has 9 parts, want 1 to 8"),
    "parts at other sites": (
        replace(SLOT, read=Direction((Part(V), *NARROW.parts))), "", "of vectors that act at different sites",
    ),
    "replacing more than all": (
        Slot("replace", None, WAY, tuple((site, Numbers.of(0.0, 1.5)) for site in V.sites)), "", "replaces 1.5 of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_slot_that_no_process_would_read_is_refused_where_its_intervention_stands(case: str, lowering: Any) -> None:
    slot, field, said = REFUSED[case]
    with pytest.raises(SteeringError) as caught:
        lowering(slot)
    assert caught.value.field == f"interventions[1]{field}"
    assert said in caught.value.message


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, INFINITY, -INFINITY, math.nan, 65504.0, 65536.0, 1e-45, 1e39]), st.floats(-2, 2)
)


@given(st.sampled_from(list(RESPONSES)), st.lists(numbers, min_size=7, max_size=7), st.tuples(*[st.booleans()] * 3))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_resolves_travels(lowering: Any, name: str, drawn: list[float], given: tuple[bool, ...]) -> None:
    reads, writes, sees_two = given
    own = Numbers.of(*drawn[: 1 + len(RESPONSES[name].numbers)])
    slot = Slot(
        name, WAY if reads else None, WAY if writes else None, tuple((site, own) for site in V.sites),
        second=WAY if sees_two else None,
    )  # fmt: skip
    refusal, steering = None, None
    try:
        steering = lowering(slot)
    except SteeringError as error:
        refusal = error
    if steering is None:
        assert refusal is not None
        assert refusal.field.startswith("interventions")
        return
    assert decode(encode(steering), {}) == steering
    assert all(np.isfinite(way.row(way.sites)).all() for slot in steering.slots for way in slot.directions)


SOFTEN = Response("soften", 30, ("limit",), {"limit": 0.0})


@pytest.mark.parametrize("odd", [False, True])
def test_a_response_that_is_odd_says_the_same_of_a_direction_and_its_opposite(
    odd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RESPONSES, "soften", replace(SOFTEN, odd=odd))

    def lower(self: Ablate, vectors: Any, path: str) -> tuple[Slot]:
        read = self.direction(vectors, path)
        return (Slot("soften", read, None, tuple((site, Numbers.of(0.0, self.strength)) for site in read.sites)),)

    monkeypatch.setattr(Ablate, "lower", lower)
    one, same = ({"kind": "ablate", "vector": way, "strength": 1.5} for way in (V, V * -2))
    other = {"kind": "ablate", "vector": V, "strength": 0.5}
    if odd:
        assert resolve(one, same) == resolve(one)
        assert resolve(one, same).decode.slots[0].at[HERE] == Numbers.of(0.0, 1.5)
    else:
        with pytest.raises(SteeringError, match="and no direction the opposite of the other; leave one of them out"):
            resolve(one, same)
    with pytest.raises(SteeringError, match="different things: on one direction numbers and gates must be equal"):
        resolve(one, other)
    with pytest.raises(SteeringError, match="different things: one direction has one response; leave"):
        resolve(one, {"kind": "clamp", "vector": V, "max": 1})
