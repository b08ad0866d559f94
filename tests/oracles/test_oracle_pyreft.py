"""`lowrank` and `add` against pyreft's interventions, trained for a few steps on the tiny model, and `replace` against
pyvene's, on which they stand.

pyreft acts at chosen positions of a prompt (`f1+l1`: the first and the last), or, if none are chosen, on new tokens
alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import pyvene
import torch
from pyreft import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
    ReftConfig,
    ReftModel,
    get_intervention_locations,
    get_reft_model,
)
from side_by_side import PROMPTS, H, Llama, assert_same, at, direction, llama

LAYERS, RANK = (0, 2), 3
WANTED = torch.tensor([3, 5, 8, 1, 9])

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # read [r, H], bias [r], write [r, H]


def loreft(trained: Any) -> Rows:
    rotation, source = trained.rotate_layer.weight.T, trained.learned_source
    return source.weight - rotation, source.bias, rotation


def direft(trained: Any) -> Rows:
    return trained.learned_source.weight, trained.learned_source.bias, trained.rotate_layer.weight.T


def noreft(trained: Any) -> Rows:
    projection, source = trained.proj_layer, trained.learned_source
    return source.weight - projection.weight, source.bias - projection.bias, projection.weight


def nodireft(trained: Any) -> Rows:
    return trained.learned_source.weight, trained.learned_source.bias, trained.proj_layer.weight


def consreft(trained: Any) -> Rows:
    rotation = trained.rotate_layer.weight.T
    return -rotation, trained.learned_source, rotation


LOWERED: dict[type, Callable[[Any], Rows]] = {
    LoreftIntervention: loreft,
    DireftIntervention: direft,
    NoreftIntervention: noreft,
    NodireftIntervention: nodireft,
    ConsreftIntervention: consreft,
}


def everywhere(prompt: list[int]) -> dict[str, Any]:
    """All positions of a prompt, for each intervention of a model."""
    return {"sources->base": (None, [[list(range(len(prompt)))]] * len(LAYERS))}


def trained(kind: type) -> ReftModel:
    """A model of its own, with interventions of a kind that have learned something of a continuation."""
    torch.manual_seed(1)
    options = {"embed_dim": H, "low_rank_dimension": RANK, "dtype": torch.float32, "add_bias": True}
    parts = [
        {"layer": layer, "component": "block_output", "low_rank_dimension": RANK, "intervention": kind(**options)}
        for layer in LAYERS
    ]
    reft = get_reft_model(llama(), ReftConfig(representations=parts), set_device=False)
    optimizer = torch.optim.Adam((p for p in reft.parameters() if p.requires_grad), 0.05)
    losses = []
    for _ in range(6):
        _, out = reft({"input_ids": torch.tensor(PROMPTS[:1])}, unit_locations=everywhere(PROMPTS[0]))
        loss = torch.nn.functional.cross_entropy(out.logits[0], WANTED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    return reft


def lowered(reft: ReftModel, phase: str | None = None, where: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same as our interventions."""
    there = {"phase": phase} if where is None else {"where": where}
    steps = []
    for layer, one in zip(LAYERS, reft.interventions.values(), strict=True):
        read, bias, write = (rows.detach() for rows in LOWERED[type(one)](one))
        named = {key: [at([layer], row) for row in rows] for key, rows in {"read": read, "write": write}.items()}
        steps.append({"kind": "lowrank", **named, "bias": bias.tolist(), **there})
    return {"interventions": steps}


def generating(reft: Any, phase: str) -> Callable[..., Any]:
    """Transformers' `generate` with the model's interventions in a phase, as pyvene tells them apart."""

    def generate(**inputs: Any) -> Any:
        base = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        where = {"unit_locations": everywhere(base["input_ids"][0].tolist()), "intervene_on_prompt": True}
        with torch.no_grad():
            return reft.generate(base, **(where if phase == "prefill" else {}), **inputs)[1]

    return generate


@pytest.mark.parametrize("kind", LOWERED, ids=lambda kind: kind.__name__)
def test_what_pyreft_has_trained_is_an_edit_of_low_rank(kind: type) -> None:
    reft = trained(kind)
    for phase in ("prefill", "decode"):
        assert_same(lowered(reft, phase), generating(reft, phase))


def test_a_constant_edit_is_an_addition() -> None:
    reft = trained(LobireftIntervention)
    constants = {
        layer: (one.rotate_layer.weight @ one.learned_source).detach()
        for layer, one in zip(LAYERS, reft.interventions.values(), strict=True)
    }
    step = {"kind": "add", "vector": at(constants), "phase": "decode"}
    assert_same({"interventions": [step]}, generating(reft, "decode"))


def test_the_first_and_the_last_position_of_each_prompt_are_ranges() -> None:
    reft = trained(LoreftIntervention)

    def chosen(**inputs: Any) -> Any:
        base = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
        places = get_intervention_locations(
            last_position=base["input_ids"].shape[1], positions="f1+l1", num_interventions=2, share_weights=True
        )
        where = {"sources->base": (None, [[place] for place in places])}
        with torch.no_grad():
            return reft.generate(base, unit_locations=where, intervene_on_prompt=True, **inputs)[1]

    assert_same(lowered(reft, where={"prompt": [[0, 1], [-1, None]]}), chosen)


def test_a_state_put_in_the_place_of_another_is_an_interchange_intervention(model: Llama) -> None:
    states = {layer: direction(layer, 0.9) for layer in LAYERS}
    patched = pyvene.IntervenableModel(
        [
            {
                "layer": layer,
                "component": "block_output",
                "intervention": pyvene.VanillaIntervention(embed_dim=H, source_representation=state),
            }
            for layer, state in states.items()
        ],
        model,
    )
    for phase in ("prefill", "decode"):
        step = {"kind": "replace", "vector": at(states), "phase": phase}
        assert_same({"interventions": [step]}, generating(patched, phase))
