"""What was found of directions is not found again: requests bring the same vectors, in other sets, with other numbers.

Work is counted at the one place where all that is taken of a direction's numbers begins.
"""

import itertools

import numpy as np
import pytest

from kinds_cases import MODEL, H, vector
from trimtab.errors import SteeringError
from trimtab.program import Direction, slot_sets, slots
from trimtab.program.codec import decode, encode
from trimtab.program.slots import Part
from trimtab.sites import HookPoint, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import SteeringVector

SITES = tuple(Site(layer, HookPoint.POST_BLOCK) for layer in range(5))
SEEDS = itertools.count(1000)  # no test sees what another made known


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sites each look at a direction's numbers was at."""
    seen: list[int] = []
    original = Direction._values

    def counted(self: Direction, sites: tuple[Site, ...]) -> np.ndarray:
        seen.append(len(sites))
        return original(self, sites)

    monkeypatch.setattr(Direction, "_values", counted)
    return seen


def new(count: int) -> dict[str, SteeringVector]:
    return {f"v{i}": vector(next(SEEDS), SITES) for i in range(count)}


def ablate(names: str | list[str], **more: object) -> Steering:
    return Steering.parse({"interventions": [{"kind": "ablate", "vector": name, **more} for name in names]})


def test_a_second_request_of_a_set_looks_at_none_of_its_numbers_in_any_process(looks: list[int]) -> None:
    vectors = new(4)
    first = ablate([*vectors]).resolve(vectors, MODEL)
    wire = encode(first)
    copies = [SteeringVector(one.directions) for one in vectors.values()]  # as another process has them
    decode(wire, {one.digest: one for one in copies})
    assert looks
    looks.clear()
    again = ablate([*vectors]).resolve(vectors, MODEL)
    assert again == first
    decode(encode(again), {one.digest: one for one in copies})
    weaker = ablate([*vectors], strength=0.5).resolve(vectors, MODEL)
    decode(encode(weaker), {one.digest: one for one in copies})
    for names in itertools.permutations(vectors, 3):
        ablate([*names]).resolve(vectors, MODEL)
    assert looks == []


def test_a_new_vector_is_looked_at_and_none_of_those_that_are_known_but_for_its_angles(looks: list[int]) -> None:
    vectors = new(3)
    ablate(["v0", "v1"]).resolve(vectors, MODEL)
    looks.clear()
    ablate(["v0", "v1", "v2"]).resolve(vectors, MODEL)
    assert sum(looks) == (1 + 3) * len(SITES)


def test_a_set_that_was_refused_is_refused_again_in_the_same_words(looks: list[int]) -> None:
    vectors = new(2)
    vectors["near"] = vectors["v0"] + vectors["v1"] * 0.01
    said = []
    for _ in range(2):
        with pytest.raises(SteeringError, match="cannot act together") as refused:
            ablate(["v0", "near"]).resolve(vectors, MODEL)
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_what_is_known_of_one_content_is_not_taken_for_that_of_another() -> None:
    vectors = new(2)
    vectors["same"] = vectors["v0"] * 3.0
    for _ in range(2):
        assert len(ablate(["v0", "v1"]).resolve(vectors, MODEL).decode.slots) == 2
        assert len(ablate(["v0", "same"]).resolve(vectors, MODEL).decode.slots) == 1
        narrow = ablate(["v0", "v1"], layers=[1, 3]).resolve(vectors, MODEL).decode.slots
        assert {slot.sites for slot in narrow} == {(SITES[1], SITES[3])}


def test_cosines_have_the_same_bits_in_whatever_set_and_order_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [Direction((Part(one),)) for one in new(4).values()]
    place = slot_sets._place(SITES)

    def fresh(chosen: list[Direction], at_once: int) -> np.ndarray:
        monkeypatch.setattr(slots, "AT_ONCE", at_once)
        slot_sets._COSINES._made.clear()
        return slot_sets._cosines(chosen, SITES, place)

    whole = fresh(ways, 1 << 15)
    units = [np.stack([way.parts[0].vector.directions[site] for site in SITES]).astype(float) for way in ways]
    units = [unit / np.sqrt((unit**2).sum(axis=1, keepdims=True)) for unit in units]
    np.testing.assert_allclose(whole, np.einsum("ksh,jsh->skj", units, units), atol=1e-15 * H)
    for at_once in (1, 3 * H, 8 * H, 1 << 15):
        np.testing.assert_array_equal(fresh(ways[::-1], at_once), whole[:, ::-1, ::-1])
        for one, other in itertools.combinations(range(4), 2):
            np.testing.assert_array_equal(fresh([ways[one], ways[other]], at_once)[:, 0, 1], whole[:, one, other])
