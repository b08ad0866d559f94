"""Where an intervention acts: one direction at every layer and hook point that is named, several narrowed to them."""

import pickle
from typing import Any

import numpy as np
import pytest

from kinds_cases import H, resolve, vector
from trimtab.errors import SteeringError
from trimtab.sites import HookPoint, Site
from trimtab.spec import Steering
from trimtab.vectors.vector import Part, SteeringVector

ONE = Site(2, HookPoint.POST_BLOCK)
ROW = np.arange(1.0, H + 1)
SPREAD = SteeringVector({ONE: ROW})
SEVERAL = vector(3, tuple(Site(layer, hook) for layer in (1, 2) for hook in (HookPoint.PRE_ATTN, HookPoint.MLP_OUT)))

PLACES: dict[str, tuple[dict[str, Any], list[Site]]] = {
    "layers": ({"layers": [4, 0]}, [Site(0, HookPoint.POST_BLOCK), Site(4, HookPoint.POST_BLOCK)]),
    "hook points": ({"hooks": ["mlp_out", "pre_attn"]}, [Site(2, HookPoint.PRE_ATTN), Site(2, HookPoint.MLP_OUT)]),
    "their product": (
        {"hooks": ["pre_attn", "mlp_out"], "layers": [3, 1]},
        [Site(layer, hook) for layer in (1, 3) for hook in (HookPoint.PRE_ATTN, HookPoint.MLP_OUT)],
    ),
    "its own": ({"layers": [2], "hooks": ["post_block"]}, [ONE]),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("kind", ["add", "ablate"])
def test_a_vector_with_one_site_acts_at_the_product_of_layers_and_hooks(case: str, kind: str) -> None:
    places, sites = PLACES[case]
    found = resolve({"kind": kind, "vector": SPREAD, **places}).decode
    assert found.sites == tuple(sites)
    written_out = SteeringVector({site: ROW for site in sites})
    assert found.identity == resolve({"kind": kind, "vector": written_out}).decode.identity
    used = next(iter(found.vectors), None) or found.slots[0].read.parts[0].vector
    assert used.digest == written_out.digest
    np.testing.assert_array_equal(used.block, written_out.block)


def test_a_vector_with_several_sites_is_narrowed_to_layers_and_hooks() -> None:
    for places, sites in (
        ({"hooks": ["mlp_out"]}, SEVERAL.sites[1::2]),
        ({"hooks": ["mlp_out"], "layers": [2]}, SEVERAL.sites[3:]),
        ({"hooks": ["pre_attn", "mlp_out"]}, SEVERAL.sites),
        ({"layers": [1]}, SEVERAL.sites[:2]),
    ):
        found = resolve({"kind": "add", "vector": SEVERAL, **places}).decode
        assert found.sites == sites
        (term,) = found.terms
        np.testing.assert_array_equal(term.vector.block, [SEVERAL.directions[site] for site in sites])


REFUSED = {
    "a hook point that it lacks": (
        {"vector": SEVERAL, "hooks": ["mlp_in"]}, "hooks", "mlp_in is not among its hook points pre_attn, mlp_out",
    ),
    "a layer that it lacks": ({"vector": SEVERAL, "layers": [3]}, "layers", "layer 3 is not among its layers 1, 2"),
    "an unknown hook point": ({"vector": SPREAD, "hooks": ["post_blok"]}, "hooks[0]", "did you mean 'post_block'"),
    "one hook point": ({"vector": SPREAD, "hooks": "mlp_in"}, "hooks", "got str, want a list of hook points"),
    "no hook points": ({"vector": SPREAD, "hooks": []}, "hooks", "nothing would be steered"),
    "a hook point twice": ({"vector": SPREAD, "hooks": ["mlp_in", "mlp_in"]}, "hooks[1]", "is given twice"),
    "a number": ({"vector": SPREAD, "hooks": [3]}, "hooks[0]", "got 3, want one of"),
    "a layer that the model lacks": ({"vector": SPREAD, "layers": [0, 6]}, "layers", "the layers are 0 to 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_places_that_cannot_be_are_refused(case: str) -> None:
    step, field, said = REFUSED[case]
    for kind in ("add", "ablate"):
        with pytest.raises(SteeringError) as caught:
            resolve({"kind": "add", "vector": SPREAD}, {"kind": kind, **step})
        assert caught.value.field == f"interventions[1].{field}"
        assert said in caught.value.message


def test_a_spec_with_hooks_dumps_to_json_that_reads_back_to_it() -> None:
    spec = Steering.parse({"interventions": [{"kind": "ablate", "vector": SPREAD, "hooks": ["mlp_out", "pre_attn"]}]})
    assert spec.interventions[0].hooks == (HookPoint.PRE_ATTN, HookPoint.MLP_OUT)
    assert Steering.parse(spec.model_dump_json()) == spec


def test_a_spread_direction_is_held_once() -> None:
    """A request names thousands of sites in a few bytes: they must not take thousands of rows of memory."""
    sites = [Site(layer, hook) for layer in range(1000) for hook in HookPoint]
    wide = SteeringVector({ONE: np.ones(4096)})
    spread = wide.spread(sites)
    assert spread.whole is wide.whole
    assert spread.block.strides[0] == 0
    assert not spread.block.flags.writeable
    for narrower in (
        spread.at([3, 4]),
        spread.part(Part(Site(2, HookPoint.MLP_IN), False)),
        spread.at_hooks(["mlp_in"]),
    ):
        assert narrower is not None
        assert narrower.is_spread
        assert narrower.whole is wide.whole
    assert spread.at([3]).part(Part(Site(3, HookPoint.PRE_ATTN), True)) is None


def test_a_spread_vector_is_a_vector_like_others() -> None:
    sites = [Site(layer, HookPoint.MLP_IN) for layer in (0, 3)]
    spread, plain = SPREAD.spread(reversed(sites)), SteeringVector({site: ROW for site in sites})
    assert spread == plain
    assert pickle.loads(pickle.dumps(spread)) == plain
    assert (spread.sites, spread.max_abs, spread.norms()) == (plain.sites, plain.max_abs, plain.norms())
    assert spread * 2 == plain * 2
    assert spread.at([3]) == plain.at([3])
    assert SPREAD.spread([ONE]) is SPREAD
    with pytest.raises(ValueError, match="4 sites cannot be spread"):
        SEVERAL.spread(sites)


def test_a_spread_ablation_does_not_compute_each_row_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request of 6,000 sites makes the server compute before its sites are checked is one row's worth."""
    sizes: list[int] = []
    norm = np.linalg.norm

    def counted(values: Any, *args: Any, **more: Any) -> Any:
        sizes.append(np.size(values))
        return norm(values, *args, **more)

    monkeypatch.setattr(np.linalg, "norm", counted)
    with pytest.raises(SteeringError, match="does not exist"):
        resolve(
            {
                "kind": "ablate",
                "vector": SPREAD,
                "layers": list(range(1000)),
                "hooks": [hook.value for hook in HookPoint],
            }
        )
    assert 0 < sum(sizes) <= 4 * H
