"""`feature` does what SAELens computes: its decoder of its own activations with one of them set, plus its error."""

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes import GatedSAE, GatedSAEConfig, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig

from kinds_cases import HERE, LAYERS, SITES
from kinds_device import served
from trimtab.sites import ModelSites, SlotLimits
from trimtab.vectors import Dictionary

H, F, TOKENS = 32, 24, 200
SAES = {
    "relu": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
}
MODEL = ModelSites(H, LAYERS, SITES, slots=SlotLimits(2, SITES, frozenset({"feature"})))


def tiny(architecture: str, subtracts: bool) -> Any:
    """A random autoencoder, all of whose parameters matter."""
    made, config = SAES[architecture]
    sae = made(config(d_in=H, d_sae=F, apply_b_dec_to_input=subtracts))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            size = 0.3 if name in ("r_mag", "threshold") else 1.0
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
        if architecture == "jumprelu":
            sae.threshold.abs_().mul_(5)
    return sae


def dictionary(sae: Any, architecture: str, subtracts: bool) -> Dictionary:
    own = {
        "relu": lambda: {"bias": sae.b_enc},
        "jumprelu": lambda: {"bias": sae.b_enc, "threshold": sae.threshold},
        "gated": lambda: {"bias": sae.b_mag, "gate_bias": sae.b_gate, "r_mag": sae.r_mag},
    }[architecture]()
    return Dictionary.from_weights(
        architecture, HERE, {"seven": 7, "three": 3}, encoder=sae.W_enc, decoder=sae.W_dec, **own,
        subtracted=sae.b_dec if subtracts else None,
    )  # fmt: skip


CHANGES = {
    "set": ({"set": 4.0}, lambda f: torch.full_like(f, 4.0)),
    "negative": ({"set": -4.0}, lambda f: torch.full_like(f, -4.0)),
    "off": ({"scale": 0}, torch.zeros_like),
    "stronger": ({"scale": 3, "add": 0.5}, lambda f: 3 * f + 0.5),
    "only if active": ({"set": 4.0, "only_if_active": True}, lambda f: torch.where(f > 0, 4.0, 0.0)),
    "bounded": ({"min": 1.0, "max": 2.0}, lambda f: f.clamp(1.0, 2.0)),
}


@pytest.mark.parametrize(("said", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("architecture", SAES)
def test_a_changed_feature_is_what_saelens_decodes_plus_its_error(
    architecture: str, subtracts: bool, said: dict[str, Any], change: Any
) -> None:
    sae = tiny(architecture, subtracts)
    x = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        acts = sae.encode(x)
        error = x - sae.decode(acts)
        assert 0.1 < (acts[:, 7] > 0).float().mean() < 0.9  # it fires on some tokens, and not on others
        acts[:, 7], acts[:, 3] = change(acts[:, 7]), 1.0
        expected = (sae.decode(acts) + error).numpy()
    rows = dictionary(sae, architecture, subtracts)
    steps = [{"kind": "feature", "dictionary": rows, "feature": "seven", **said},
             {"kind": "feature", "dictionary": rows, "feature": "three", "set": 1.0}]  # fmt: skip
    np.testing.assert_allclose(served(x.numpy(), *steps, model=MODEL), expected, atol=1e-3)


@pytest.mark.parametrize("architecture", SAES)
def test_in_bfloat16_the_same_tokens_fire_as_in_saelens(architecture: str) -> None:
    """Whose answer is float32 on the stream as it is: a row in bfloat16 would let others fire."""
    sae = tiny(architecture, True)
    x = (4 * torch.randn(4 * TOKENS, H, generator=torch.Generator().manual_seed(7))).bfloat16()
    with torch.no_grad():
        fires = sae.encode(x.float())[:, 7] > 0
    step = {"kind": "feature", "dictionary": dictionary(sae, architecture, True), "feature": "seven", "set": 1e4,
            "only_if_active": True}  # fmt: skip
    found = served(x.float().numpy(), step, dtype=torch.bfloat16, model=MODEL)
    moved = np.abs(found - x.double().numpy()).max(axis=1) > 1e3
    np.testing.assert_array_equal(moved, fires.numpy())
