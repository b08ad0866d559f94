"""The settings of slots: what they come to, what is refused at start, and what is held to them later."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimtab import Steering, SteeringVector
from trimtab.engines.vllm.carried import checked, held_bytes
from trimtab.engines.vllm.settings.config import SteeringSettings, model_sites, stamped
from trimtab.engines.vllm.settings.flags import settings_from_flags
from trimtab.engines.vllm.settings.slots import slot_form
from trimtab.engines.vllm.settings.tables import decide_tables
from trimtab.errors import SteeringError
from trimtab.ops import SlotForm
from trimtab.ops.sizes import row_bytes
from trimtab.program.codec import encode
from trimtab.program.lowering import contents_of
from trimtab.program.resolved_gate import rows_needed
from trimtab.program.room import check_room
from trimtab.sites import HookPoint, ModelSites, Site, SlotLimits

WIDTH, LAYERS = 8, 6
HOOKS = ("pre_attn", "post_attn", "post_block")
ALL = SlotLimits(4, frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(LAYERS)), frozenset({"clamp"}))


def engine() -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS), get_hidden_size=lambda: WIDTH, dtype=torch.float32
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )


def limits(**given: Any) -> SlotLimits:
    return model_sites(engine(), SteeringSettings.parse(given)).slots


def test_by_default_there_are_none_and_nothing_of_them_is_in_graphs_or_tables() -> None:
    assert limits() == SlotLimits()
    assert slot_form(limits()) is None
    assert model_sites(engine(), SteeringSettings()).slots == SlotLimits()


def test_slots_alone_serve_the_usual_kinds_wherever_the_engine_steers() -> None:
    found = limits(slots=2, layers="1-3", hook_points=HOOKS)
    assert found.count == 2
    assert found.kinds == {"ablate", "clamp", "scale"}
    assert found.sites == {Site(layer, HookPoint(hook)) for layer in (1, 2, 3) for hook in HOOKS}
    assert slot_form(found) == SlotForm(2, ("clip",), False)


def test_layers_and_kinds_are_those_that_were_named() -> None:
    found = limits(slots=1, slot_layers="2,4-5", kinds=["swap", "add", "clamp", "swap"])
    assert found.sites == {Site(layer, HookPoint.POST_BLOCK) for layer in (2, 4, 5)}
    assert found.kinds == {"clamp", "swap"}  # adding needs no slot
    assert slot_form(found) == SlotForm(1, ("clip",), True)


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"slots": 17}, "steering.slots", "less than or equal to 16"),
        ({"slots": -1}, "steering.slots", "greater than or equal to 0"),
        ({"kinds": ["clamp"]}, "steering.kinds", r"given without slots.*\(--steering-slots N\)"),
        ({"slot_layers": "1"}, "steering.slot_layers", r"given without slots.*\(--steering-slots N\)"),
        ({"slots": 1, "kinds": ["clmap"]}, "steering.kinds", r"no kind 'clmap' \(did you mean 'clamp'\?\); the kinds"),
        ({"slots": 1, "kinds": ["add"]}, "steering.kinds", "names no kind that needs slots: these are ablate, clamp"),
        ({"slots": 1, "kinds": []}, "steering.kinds", "names no kind that needs slots"),
        ({"slots": 1, "slot_layers": "9"}, "steering.slot_layers", r"layers \[9\] do not exist"),
        ({"slots": 1, "slot_layers": "0-2", "layers": "1-3"}, "steering.slot_layers", r"layers \[0\] are not among"),
    ],
)
def test_settings_without_effect_or_sense_are_refused_by_name(given: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(SteeringError, match=said) as caught:
        limits(**given)
    assert caught.value.field == field


def test_flags_name_kinds_one_by_one_or_with_commas() -> None:
    flags = {"steering_slots": 2, "steering_slot_layers": "1-2", "steering_kinds": ["clamp,scale", "ablate"]}
    assert settings_from_flags(flags) == {"slots": 2, "slot_layers": "1-2", "kinds": ["clamp", "scale", "ablate"]}


def test_the_stamp_tells_engines_with_other_slots_apart() -> None:
    given = ({}, {"slots": 1}, {"slots": 2}, {"slots": 1, "slot_layers": "1"}, {"slots": 1, "kinds": ["clamp"]})
    stamps = [stamped(engine(), SteeringSettings.parse(settings)).stamp for settings in given]
    assert all(one != other for i, one in enumerate(stamps) for other in stamps[:i])
    usual = [{"slots": 1}, {"slots": 1, "kinds": ["scale", "clamp", "ablate"], "slot_layers": "0-5"}]
    first, second = (stamped(engine(), SteeringSettings.parse(settings)).stamp for settings in usual)
    assert first == second  # the same graphs, however they were asked for


def test_records_of_slots_count_in_the_tables_of_the_stage_that_has_most() -> None:
    form = SlotForm(4, ("clip",), False)
    model = ModelSites(WIDTH, LAYERS, ALL.sites, slots=ALL)
    for stages, sites in (((), LAYERS), ((2,), 4)):
        staged = replace(model, gates=replace(model.gates, stages=stages))
        found = decide_tables(engine(), staged, 0.01, None)
        each = row_bytes(sites, WIDTH, torch.float32, slots=form, slot_sites=sites)
        assert found.nbytes == found.rows * each > found.rows * row_bytes(sites, WIDTH, torch.float32)
        assert found.rows == rows_needed(2, 0, 16)  # as many as two requests of sixteen interventions may need


def test_the_least_of_tables_holds_sixteen_features_in_four_rows_each() -> None:
    served = SlotLimits(16, ALL.sites, frozenset({"feature"}))
    model = ModelSites(WIDTH, LAYERS, ALL.sites, slots=served)
    rows = [{"post_block": {"1": row.tolist()}} for row in np.random.default_rng(0).normal(size=(32, WIDTH))]
    steps = [
        {"kind": "feature", "architecture": "relu", "encoder": rows[2 * i], "decoder": rows[2 * i + 1], "set": 1,
         "phase": ("prefill", "decode")[i % 2]}
        for i in range(16)
    ]  # fmt: skip
    asked = Steering.parse({"interventions": steps}).resolve({}, model)
    least = decide_tables(engine(), model, 1, None)
    assert least.rows == rows_needed(1, 0, 16, 4)
    check_room(asked, least.room, "")
    assert len(contents_of(asked, lowers=False).rows) == 2 + 16 * 4


SPEC = {"kind": "clamp", "vector": {"post_block": {"1": np.arange(1.0, 9.0).tolist()}}, "max": 1.0}


def sent(*steps: dict[str, Any], served: SlotLimits = ALL) -> Any:
    model = ModelSites(WIDTH, LAYERS, ALL.sites, slots=served)
    return encode(Steering.parse({"interventions": list(steps)}).resolve({}, model))


@pytest.mark.parametrize(
    ("served", "said"),
    [
        (SlotLimits(), "no slots at post_block:1"),
        (replace(ALL, sites=frozenset({Site(2, HookPoint.POST_BLOCK)})), "no slots at post_block:1"),
        (replace(ALL, count=1), "has 2 slots at post_block:1; this engine has 1"),
        (replace(ALL, kinds=frozenset({"clamp"})), "has a slot of a kind that this engine does not serve"),
    ],
)
def test_what_comes_from_another_process_is_held_to_the_limits_too(served: SlotLimits, said: str) -> None:
    other = {**SPEC, "vector": {"post_block": {"1": np.ones(WIDTH).tolist()}}}
    swap = {"kind": "swap", "vector": other["vector"], "to": SPEC["vector"]}
    wire = sent(SPEC, swap if "kind that" in said else other, served=replace(ALL, kinds=frozenset({"clamp", "swap"})))
    settings: Any = SteeringSettings()
    assert checked(
        wire, settings, ModelSites(WIDTH, LAYERS, ALL.sites, slots=replace(ALL, kinds=frozenset({"clamp", "swap"})))
    )
    with pytest.raises(SteeringError, match=said):
        checked(wire, settings, ModelSites(WIDTH, LAYERS, ALL.sites, slots=served))


def test_vectors_of_slots_that_are_content_count_in_what_is_kept(tmp_path: Path) -> None:
    model = ModelSites(WIDTH, LAYERS, ALL.sites, slots=ALL)
    vector = SteeringVector({Site(1, HookPoint.POST_BLOCK): np.arange(1.0, 9.0)})
    for source, kept in ((vector, vector.block.nbytes), ("calm", 0)):
        spec = {"interventions": [{**SPEC, "vector": source}]}
        assert held_bytes(Steering.parse(spec).resolve({"calm": vector}, model)) == kept
