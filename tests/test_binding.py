"""The share of a default that a request leaves, against its definition in plain numbers, in every state of gates."""

import itertools
import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.program import EMPTY, ResolvedSteering, Slot, Spans
from trimtab.program.spans import IdSet
from trimtab.serving.binding import least_share
from trimtab.serving.slot_losses import span_of
from trimtab.sites import GateLimits, HookPoint, ModelSites, Phase, Site, SlotLimits, site_order
from trimtab.spec import Steering

WIDTH, LAYERS = 3, 4
SITES = frozenset(Site(layer, hook) for layer in range(LAYERS) for hook in HookPoint)
SLOTS = SlotLimits(8, SITES, frozenset({"ablate", "clamp", "scale", "swap", "rotate", "lowrank", "feature"}))
MODEL = ModelSites(WIDTH, LAYERS, SITES, GateLimits(8, SITES), slots=SLOTS)


def resolved(*steps: dict[str, Any]) -> ResolvedSteering:
    return Steering.parse({"interventions": [{"kind": "add"} | step for step in steps]}).resolve({}, MODEL)


def at(hook: str, layer: int, *row: float) -> dict[str, Any]:
    return {hook: {str(layer): list(row)}}


FEATURE = {"kind": "feature", "architecture": "relu", "encoder": at("post_block", 1, 0.0, 1.0, 0.0), "set": 3.0}


def gate(threshold: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"probe": at("pre_attn", 0, 1.0, 0.0, 0.0), "threshold": threshold, **more}


PUSH = {"vector": at("post_block", 1, 2.0, 0.0, 0.0)}


def back(scale: float, hook: str = "post_block", layer: int = 1, **more: Any) -> dict[str, Any]:
    return {"vector": at(hook, layer, 2.0, 0.0, 0.0), "scale": -scale, **more}


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ([back(1.0)], 0.0),  # the very same, cancelled
        ([back(0.5)], 0.5),
        ([back(2.0)], -1.0),
        ([back(0.3), back(0.3)], 0.4),  # in two halves
        ([{"vector": at("post_block", 1, -1.0, 5.0, 5.0)}], 0.5),  # another vector that points partly back
        ([{"vector": at("post_block", 1, 0.0, 9.0, 9.0)}], 1.0),  # across it
        ([back(-1.0)], 2.0),  # along it
        ([back(1.0, "pre_attn", 2)], 0.0),  # another name for the same place
        ([back(1.0, "pre_attn", 3)], 0.0),  # later in the stream
        ([back(1.0, "post_block", 0)], 0.0),  # before it
        ([back(0.6, "post_block", 0), back(0.6, "post_block", 2)], -0.2),
        ([back(1.0, "mlp_out", 1)], 0.0),  # what the MLP puts out is added to the stream
        ([back(1.0, gate=gate())], 0.0),  # as if the gate were open
        ([back(1.0, gate=gate()), back(-1.0)], 1.0),  # 1 + 1 - 1
        ([back(-1.0, gate=gate())], 1.0),  # as if it were shut
        ([back(1.0, phase="prefill")], 0.0),
    ],
)
def test_what_is_taken_back_counts_wherever_it_is_taken(own: list[dict[str, Any]], left: float) -> None:
    share = least_share(resolved(PUSH), resolved(*own))
    assert share is not None
    assert share.left == pytest.approx(left, abs=1e-6)
    assert share.keeps_the_promise is (left >= 0.5)


def slot(kind: str, *row: float, hook: str = "post_block", layer: int = 1, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "vector": at(hook, layer, *row), **more}


NONE = None  # of it is sure to be left


def toward(cosine: float, **more: Any) -> dict[str, Any]:
    """An ablation along a direction that has this cosine with the default's."""
    return slot("ablate", cosine, float(np.sqrt(1.0 - cosine**2)), 0.0, **more)


@pytest.mark.parametrize(
    ("own", "left"),
    [
        (
            [toward(1.0)],
            -1.0,
        ),  # with strength 2 it would be turned around, and none of them is measured by its strength
        ([toward(0.25)], 1 - 2 * 0.0625),
        ([toward(0.25, gate=gate())], 1 - 2 * 0.0625),
        ([toward(0.25, layer=0), toward(0.25, layer=3)], 1 - 2 * 0.0625),  # one span, however often
        ([toward(0.0)], 1.0),
        ([toward(0.25), {"vector": at("post_block", 0, 0.0, 0.0, 4.0)}], 1 - 2 * 0.25 * (0.25 + 4 / 2)),
        ([slot("clamp", 0.25, 0.0, np.sqrt(1 - 0.0625), value=-4.0, strength=0.5)], 1 - 2 * 0.25 * (0.25 + 2 / 2)),
        ([slot("clamp", 0.0, 1.0, 0.0, value=-4.0)], 1.0),
        ([slot("scale", 0.0, 1.0, 0.0, factor=9.0)], 1.0),
        ([slot("scale", 0.1, 1.0, 0.0, factor=9.0)], NONE),  # makes longer what it has a part of
        ([toward(0.1), slot("ablate", 0.0, 0.0, 1.0)], NONE),  # two at one site
        ([slot("swap", 0.0, 1.0, 0.0, to=at("post_block", 1, 0.0, 0.0, 1.0))], 1.0),
        ([slot("swap", 0.0, 1.0, 0.0, to=at("post_block", 1, 0.1, 0.0, 1.0))], NONE),
        ([slot("rotate", 0.0, 1.0, 0.0, plane=at("post_block", 1, 0.0, 0.0, 1.0), by=90.0)], 1.0),
        ([slot("rotate", 0.0, 1.0, 0.0, plane=at("post_block", 1, 1.0, 0.0, 0.0), by=1.0)], NONE),
        ([{"kind": "lowrank", "read": [at("post_block", 1, 0.0, 1.0, 0.0)], "write": [PUSH["vector"]]}], NONE),
        ([FEATURE | {"decoder": at("post_block", 1, 0.0, 0.0, 1.0)}], 1.0),
        ([FEATURE | {"decoder": at("post_block", 1, 0.1, 0.0, 1.0)}], NONE),
        # A relay: one copies the default's push elsewhere, the next turns the copy against it.
        (
            [
                {
                    "kind": "lowrank",
                    "read": [at("post_block", 0, 1.0, 0, 0)],
                    "write": [at("post_block", 0, 0, 1.0, 0)],
                },
                {
                    "kind": "lowrank",
                    "read": [at("post_block", 1, 0, 1.0, 0)],
                    "write": [at("post_block", 1, -1.0, 0, 0)],
                },
            ],
            NONE,
        ),
    ],
)
def test_slots_count_by_what_they_could_take_at_most(own: list[dict[str, Any]], left: float | None) -> None:
    share = least_share(resolved(PUSH), resolved(*own))
    assert share is not None
    assert share.left <= 0.0 if left is NONE else share.left == pytest.approx(left, abs=1e-6)


def test_beside_slots_of_a_default_nothing_is_measured() -> None:
    share = least_share(resolved(slot("ablate", 1.0, 0.0, 0.0)), resolved(back(-5.0, layer=3)))
    assert share is not None
    assert share.left == 0.0


steps = st.fixed_dictionaries(
    {
        "hook": st.sampled_from(["pre_attn", "mlp_in", "mlp_out", "post_block"]),
        "layer": st.integers(1, LAYERS - 1),
        "row": st.lists(st.integers(-3, 3), min_size=WIDTH, max_size=WIDTH),
        "gate": st.sampled_from([None, 0.0, 1.0]),
        "phase": st.sampled_from(["all", "prefill", "decode"]),
    }
)


def written(step: dict[str, Any]) -> dict[str, Any]:
    more = {} if step["gate"] is None else {"gate": gate(step["gate"])}
    return {"vector": at(step["hook"], step["layer"], *step["row"]), "phase": step["phase"], **more}


contractions = st.fixed_dictionaries(
    {
        "layer": st.integers(0, LAYERS - 1),
        "row": st.lists(st.integers(-3, 3), min_size=WIDTH, max_size=WIDTH).filter(any),
        "strength": st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]),
        "open": st.sampled_from([0.0, 0.5, 1.0]),
    }
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(contractions, min_size=1, max_size=LAYERS, unique_by=lambda step: step["layer"]),
    st.lists(steps, max_size=2),
)
def test_no_state_of_the_gates_leaves_less_than_the_bound(slots: list[Any], added: list[Any]) -> None:
    """Runs a change of the stream through every layer: the default's push, what is added, and slots half open."""
    added = [step | {"hook": "post_block", "gate": None, "phase": "all"} for step in added]
    ablations = [slot("ablate", *step["row"], layer=step["layer"], strength=step["strength"]) for step in slots]
    found = least_share(resolved(PUSH), resolved(*ablations, *map(written, added)))
    change, push = np.zeros(WIDTH), np.array([2.0, 0.0, 0.0])
    for layer in range(LAYERS):
        change = change + (push if layer == 1 else 0.0)
        change = change + sum(
            (np.array(step["row"], float) for step in added if step["layer"] == layer), np.zeros(WIDTH)
        )
        for step in slots:
            if step["layer"] == layer:
                unit = np.array(step["row"]) / np.linalg.norm(step["row"])
                change = change - step["strength"] * step["open"] * (unit @ change) * unit
        if layer >= 1:
            left = float(change @ push) / float(push @ push)
            assert (1.0 if found is None else found.left) <= left + 1e-6


def test_where_they_never_meet_nothing_is_taken() -> None:
    assert least_share(resolved(PUSH | {"phase": "decode"}), resolved(back(1.0, phase="prefill"))) is None
    assert least_share(resolved(PUSH), resolved(back(0.0))) is None
    assert least_share(resolved(PUSH), resolved(back(1.0), back(-1.0))) is None
    into_mlp = least_share(resolved(PUSH), resolved(back(1.0, "mlp_in", 1)))
    assert into_mlp is not None
    assert into_mlp.left == 1.0


def test_a_site_of_many_counts_by_itself() -> None:
    everywhere = [{"vector": {"post_block": {str(layer): [1.0, 0.0, 0.0] for layer in range(LAYERS)}}}]
    one = least_share(resolved(*everywhere), resolved({"vector": at("post_block", 3, 1.0, 0.0, 0.0), "scale": -1.0}))
    assert one is not None
    assert (one.left, one.site) == (0.0, Site(3, HookPoint.POST_BLOCK))


def test_a_default_behind_a_gate_is_met_by_the_same_gate_and_by_others() -> None:
    default = resolved(PUSH | {"gate": gate()})
    for own, left in (
        (back(1.0, gate=gate()), 0.0),
        (back(-1.0, gate=gate()), 1.0),
        (back(1.0, gate=gate(1.0)), 0.0),
        (back(-1.0, gate=gate(1.0)), 1.0),
        (back(1.0), 0.0),
        (back(0.25), 0.75),
    ):
        share = least_share(default, resolved(own))
        assert share is not None
        assert share.left == pytest.approx(left, abs=1e-6)


def test_a_push_behind_the_defaults_gate_does_not_make_up_for_what_takes_back_behind_none() -> None:
    """At a gate nine tenths open, 0.9 (1 + 10) - 10 is a default reversed."""
    share = least_share(resolved(PUSH | {"gate": gate()}), resolved(back(-10.0, gate=gate()), back(10.0)))
    assert share is not None
    assert share.left == -9.0
    assert not share.keeps_the_promise


def test_a_default_that_takes_itself_back_counts_while_it_lasts() -> None:
    window = resolved(PUSH, back(1.0, "post_block", 2))
    share = least_share(window, resolved({"vector": at("post_block", 3, 7.0, 0.0, 0.0), "scale": -1.0}))
    assert share is not None
    assert share.left == 1.0
    share = least_share(window, resolved(back(1.0)))
    assert share is not None
    assert (share.left, share.site.layer) == (0.0, 1)


def total(part: list[Any], behind: float | None, phase: Phase, site: Site, *, carried: bool) -> np.ndarray:
    """What `part` adds behind one gate at a site, or has added to the stream up to there."""
    rows = np.zeros(WIDTH)
    for step in part:
        where = Site(step["layer"], HookPoint(step["hook"]))
        before = carried and step["hook"] != "mlp_in" and site_order(where) <= site_order(site)
        if step["gate"] == behind and step["phase"] in ("all", phase.value) and (before or where == site):
            rows += step["row"]
    return rows


GATES = (None, 0.0, 1.0)
PLACES = [
    (site, carried) for site in SITES for carried in (False, True) if not (carried and site.hook == HookPoint.MLP_IN)
]


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, min_size=1, max_size=3), st.lists(steps, min_size=1, max_size=4))
def test_the_share_is_the_worst_over_all_states_of_the_gates(default: list[Any], own: list[Any]) -> None:
    least = 1.0
    for phase, kept, (site, carried) in itertools.product(Phase, GATES, PLACES):
        pushed = total(default, kept, phase, site, carried=carried)
        if not pushed.any():
            continue
        same = total(own, kept, phase, site, carried=carried)
        others = [total(own, other, phase, site, carried=carried) for other in GATES if other != kept]
        for factors in itertools.product([0.0, 1.0], repeat=len(others)):
            taken = float(same @ pushed) if kept is None else min(0.0, float(same @ pushed))
            taken += sum(factor * float(rows @ pushed) for factor, rows in zip(factors, others, strict=True))
            least = min(least, 1 + taken / float(pushed @ pushed))
    found = least_share(resolved(*map(written, default)), resolved(*map(written, own)))
    assert (1.0 if found is None else min(1.0, found.left)) == pytest.approx(least, abs=1e-9)


def test_what_looks_at_the_whole_stream_counts_as_if_it_took_all() -> None:
    later = {"vector": at("post_block", 3, 0.0, 1.0, 0.0)}
    sites = frozenset(Site(layer, HookPoint.POST_BLOCK) for layer in range(8))
    model = ModelSites(3, 8, sites, slots=SlotLimits(8, sites, frozenset({"replace", "add:norm", "keep_norm"})))

    def left(spec: dict[str, Any]) -> float | None:
        found = least_share(resolved(PUSH), Steering.parse(spec).resolve({}, model))
        return None if found is None else found.left

    assert left({"interventions": [{"kind": "replace", "amount": 0.1} | later]}) == 0.0
    assert left({"interventions": [{"kind": "replace"} | later, {"kind": "add", **back(-9.0)}]}) == 0.0
    assert left({"interventions": [{"kind": "add", "unit": "norm"} | later]}) == 0.0
    assert left({"interventions": [{"kind": "add"} | later], "keep_norm": "if_grown"}) == 0.0
    assert left({"interventions": [{"kind": "add"} | later]}) == 1.0
    before = {"vector": at("post_block", 0, 0.0, 1.0, 0.0)}
    assert left({"interventions": [{"kind": "replace"} | before]}) == 1.0


def test_what_directions_span_is_worked_out_once_for_all_numbers_along_them() -> None:
    numbers = [(1.0, 0.5, 0.0), (0.0, 2.0, 1.0)]

    def slots(strength: float) -> list[Slot]:
        steps = [{"kind": "ablate", "vector": at("post_block", 1, *row), "strength": strength} for row in numbers]
        return list(resolved(*steps).decode.slots)

    asked = [slots(strength) for strength in (1.0, 0.25, 0.5)]
    first = span_of(asked[0])
    with mock.patch.object(np.linalg, "eigh", side_effect=AssertionError("worked out again")):
        for some in asked:
            assert span_of(some) is first
            assert span_of(some[::-1]) is first
    assert first is not None
    assert first.columns.shape == (WIDTH, 2)
    one = span_of(asked[0][:1])
    assert one is not None
    np.testing.assert_allclose(np.linalg.norm(first.columns.T @ one.columns), 1.0)


@pytest.mark.parametrize("hook", HookPoint)
def test_what_puts_something_in_the_place_of_what_a_default_led_to_takes_all_of_it(hook: HookPoint) -> None:
    """What is added at `mlp_in` is gone behind the MLP, and so is its answer to that where its output is replaced."""
    model = ModelSites(WIDTH, LAYERS, SITES, slots=SlotLimits(8, SITES, frozenset({"replace", "add:norm"})))
    default = resolved({"vector": at(hook, 1, 2.0, 0.0, 0.0)})
    across: list[dict[str, Any]] = [{"kind": "replace", "amount": 0.5}, {"kind": "add", "unit": "norm"}]
    for step, site in itertools.product(across, sorted(SITES, key=site_order)):
        own = step | {"vector": at(site.hook, site.layer, 0.0, 1.0, 0.0)}
        share = least_share(default, Steering.parse({"interventions": [own]}).resolve({}, model))
        behind = site_order(site) >= site_order(Site(1, hook))
        assert (1.0 if share is None else share.left) == (0.0 if behind else 1.0), (step, site)


def spans_of(generator: random.Random, prompt: int, programs: int) -> Spans:
    """Some of the first programs for a prompt, others for its answer, where tokens decide now and then."""
    starts = sorted({0, prompt, *(generator.randrange(1, prompt + 6) for _ in range(3))})
    phases = tuple(Phase.PREFILL if place % 2 else Phase.DECODE for place in range(programs))
    choices, of = [], {phase: [place for place in range(programs) if phases[place] is phase] for phase in Phase}
    for start in starts:
        decided = start >= prompt and generator.random() < 0.3
        phase = Phase.PREFILL if start < prompt else Phase.DECODE
        choices.append(tuple(generator.choice(of[phase]) for _ in range(2 if decided else 1)))
    return Spans(prompt, tuple(starts), tuple(range(len(starts))), tuple(choices), phases, (IdSet(((0, 5),)),))


def test_where_both_have_spans_the_share_is_the_least_at_any_position() -> None:
    generator = random.Random(0)
    mine = [resolved(PUSH).prefill, resolved({"vector": at("post_block", 2, 1.0, 2.0, 0.0)}).prefill, EMPTY]
    theirs = [resolved(back(scale, layer=layer)).prefill for scale in (0.2, 0.7, -1.0) for layer in (1, 2)]
    least: set[float | None] = set()
    for _ in range(60):
        pushing = [generator.choice(mine) for _ in range(4)]
        taking = [generator.choice((EMPTY, *theirs)) for _ in range(6)]
        prompt = generator.randrange(2, 9)
        default = ResolvedSteering(tuple(pushing), spans=spans_of(generator, prompt, 4))
        own = ResolvedSteering(tuple(taking), spans=spans_of(generator, prompt, 6))
        by_phase = ResolvedSteering((taking[0], taking[1]))
        for other, places in (
            (own, lambda position, spans=own.spans: spans.programs_at(position)),
            (by_phase, lambda position, prompt=prompt: (0,) if position < prompt else (1,)),
        ):
            found = least_share(default, other)
            shares = [
                least_share(ResolvedSteering((one, EMPTY)), ResolvedSteering((another, EMPTY)))
                for position in range(prompt + 8)
                for one in (default.programs[place] for place in default.spans.programs_at(position))
                for another in (other.programs[place] for place in places(position))
            ]
            expected = min((share.left for share in shares if share is not None), default=None)
            assert (None if found is None else found.left) == expected
            least.add(expected)
    assert len(least) > 5
    assert None in least
