"""Models whose layers lie on several devices: the buffers of each site are where its layer is."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES
from oracle import Addition

from trimtab.engines.transformers import SteeredModel, groups, model, session
from trimtab.engines.transformers.groups import SiteGroup, layer_devices
from trimtab.errors import SteeringError
from trimtab.instrument.layers import find_decoder_layers
from trimtab.serving.receipt import Receipt
from trimtab.sites import HookPoint, Phase, Site

PROMPTS = [[5, 17, 3, 44, 9], [7, 8]]
ONE, OTHER = torch.device("cpu"), torch.device("cpu:0")  # one device under two names, which compare as different


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def additions() -> list[dict[str, Any]]:
    return [
        Addition("post_block", (0, 1), numbers(1), 1.5).spec(),
        Addition("mlp_out", (2,), numbers(2), phase="decode").spec(),
        Addition("pre_attn", (0, 2), numbers(3), phase="prefill").spec(),
    ]


@pytest.fixture
def made(monkeypatch: Any) -> list[tuple[torch.device, set[str]]]:
    """The groups that calls make: their device, and the sites in them."""
    seen: list[tuple[torch.device, set[str]]] = []

    class Watched(SiteGroup):
        def __init__(self, sites: Any, device: torch.device, **rest: Any) -> None:
            seen.append((device, {str(site) for site in sites}))
            super().__init__(sites, device, **rest)

    monkeypatch.setattr(session, "SiteGroup", Watched)
    return seen


def test_sites_are_steered_where_their_layers_are(monkeypatch: Any, made: Any) -> None:
    spec = {"interventions": additions()}
    with SteeredModel(FAMILIES["llama"].model()) as one:
        expected = one.generate(PROMPTS, [spec, None], max_new_tokens=5)
    monkeypatch.setattr(model, "layer_devices", lambda _: {0: ONE, 1: OTHER, 2: OTHER})
    with SteeredModel(FAMILIES["llama"].model()) as two:
        made.clear()
        out = two.generate(PROMPTS, [spec, None], max_new_tokens=5)
    assert out == expected
    assert made == [
        (ONE, {"pre_attn:0", "post_block:0"}),
        (OTHER, {"post_block:1", "pre_attn:2", "mlp_out:2"}),
    ]
    assert out[0].receipt.steered_tokens == {Phase.PREFILL: 5, Phase.DECODE: 4}


def exactly(receipt: Receipt) -> Receipt:
    """All of it but the means of corrections."""
    uses = [
        use if use.corrections is None else replace(use, corrections=replace(use.corrections, mean=None))
        for use in receipt.interventions
    ]
    return replace(receipt, interventions=tuple(uses))


def means(receipt: Receipt) -> list[float | None]:
    return [use.corrections.mean for use in receipt.interventions if use.corrections is not None]


def test_slots_act_where_their_layers_are(monkeypatch: Any, made: Any) -> None:
    def acts(vector: Any, *layers: int) -> dict[str, Any]:
        return {"post_block": {str(layer): vector.tolist() for layer in layers}}

    spec = {
        "interventions": [
            {"kind": "ablate", "vector": acts(numbers(1), 0, 1)},
            {"kind": "clamp", "vector": acts(numbers(2), 1, 2), "max": -0.5},
            {"kind": "swap", "vector": acts(numbers(3), 0), "to": acts(numbers(4), 0)},
            *additions(),
        ]
    }
    outputs = []
    for homes in ({0: ONE, 1: ONE, 2: ONE}, {0: ONE, 1: OTHER, 2: OTHER}):
        monkeypatch.setattr(model, "layer_devices", lambda _, homes=homes: homes)
        with SteeredModel(FAMILIES["llama"].model()) as steered:
            made.clear()
            outputs.append(steered.generate(PROMPTS, [spec, None], max_new_tokens=5))
        assert [device for device, _ in made] == list(dict.fromkeys(homes.values()))
    together, apart = ([output.receipt for output in each] for each in outputs)
    assert [output.token_ids for output in outputs[0]] == [output.token_ids for output in outputs[1]]
    assert [exactly(receipt) for receipt in together] == [exactly(receipt) for receipt in apart]
    # Each device adds up its own layers in float32.
    assert means(together[0]) == pytest.approx(means(apart[0]), rel=1e-6)
    assert {"post_block:1", "post_block:2"} <= made[1][1]


@pytest.mark.parametrize("how", ["gate", "monitor"])
def test_what_one_site_decides_reaches_the_sites_on_other_devices(monkeypatch: Any, made: Any, how: str) -> None:
    gate = {"probe": {"post_block": {"0": numbers(9).tolist()}}, "threshold": 0.5}
    parts = [{**part, "gate": gate} for part in additions()[:1]] if how == "gate" else additions()
    monitor = gate if how == "monitor" else None
    outputs = []
    for homes in ({0: ONE, 1: ONE, 2: ONE}, {0: ONE, 1: OTHER, 2: OTHER}):
        monkeypatch.setattr(model, "layer_devices", lambda _, homes=homes: homes)
        with SteeredModel(FAMILIES["llama"].model(), monitor=monitor) as steered:
            made.clear()
            outputs.append(steered.generate(PROMPTS, {"interventions": parts}, max_new_tokens=5))
        assert [device for device, _ in made] == [ONE]
    assert outputs[0] == outputs[1]


def test_a_tensor_from_another_device_is_steered_here_and_goes_back(monkeypatch: Any) -> None:
    moves: list[Any] = []

    class Elsewhere(torch.Tensor):
        """A tensor that says which moves are asked of it."""

        def to(self, *where: Any, **rest: Any) -> Any:
            moves.append(where[0])
            return self

    monkeypatch.setattr(groups, "emit", lambda _module, _hook, value: value)
    site = Site(0, HookPoint.POST_BLOCK)
    group = SiteGroup([site], OTHER, dtype=torch.float32, hidden_size=32, gates=0)
    group.steer(site, torch.ones(1, 32).as_subclass(Elsewhere))
    assert moves == [OTHER, ONE]


def test_each_layer_is_found_on_its_device() -> None:
    built = FAMILIES["llama"].model()
    assert layer_devices(find_decoder_layers(built)) == {0: ONE, 1: ONE, 2: ONE}


def test_a_layer_whose_weights_are_on_no_device_is_refused_when_the_model_is_opened() -> None:
    built = FAMILIES["llama"].model()
    built.model.layers[1].to("meta")
    with pytest.raises(SteeringError, match="model: the weights of layer 1 are on no device between passes"):
        SteeredModel(built)
