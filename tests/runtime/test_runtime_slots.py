"""Slots in the runtime: the records on the device are always those of the programs whose rows they lie beside."""

import numpy as np
import pytest
import torch
from runtime_model import HIDDEN, SITES, vector
from slots_model import FORM, TILTED, VECTORS, Ask, done, due, make_slot_buffers, steering

from trimtab.errors import SteeringError
from trimtab.ops import SteeringBuffers
from trimtab.program import PhaseProgram, ResolvedSteering, Term
from trimtab.program.resolved_gate import ResolvedGate
from trimtab.runtime import SteeringRuntime, slot_rows

STREAM = np.random.default_rng(7).standard_normal((len(SITES), HIDDEN)) * 3.0
SET = [Ask(VECTORS[0]), Ask(TILTED[0], 0.5, -1.0, 0.25), Ask(VECTORS[2], 1.0, 0.7, 0.7)]
BEFORE, GATE = sorted(
    (ResolvedGate.of(vector(seed, SITES[:1]), 0.25, 2.0) for seed in (70, 71)), key=lambda gate: gate.digest
)


def decode_step(runtime, *names):
    count = len(names)
    runtime.step(list(names), np.full(count, 100), np.ones(count, int), np.full(count, 10))


def assert_done(buffers, asked, token=0, factors=(), by_gate=None, tolerance=1e-5):
    for position, site in enumerate(SITES):
        if site in buffers.sites:
            got = done(buffers, STREAM[position], token, site, factors)
            wanted = due(STREAM[position], asked, site, by_gate)
            np.testing.assert_allclose(got, wanted, atol=tolerance, rtol=tolerance)


def records(buffers):
    return buffers.slots.slab.clone()


@pytest.fixture
def buffers():
    return make_slot_buffers()


@pytest.fixture
def runtime(buffers):
    return SteeringRuntime(buffers, max_requests=4)


def test_a_set_and_a_swap_do_what_was_asked_on_the_tokens_of_their_phase(runtime, buffers):
    swap = [Ask(VECTORS[3], to=VECTORS[1], sites=SITES[1:])]
    runtime.admit("a", steering(SET, swap))
    runtime.step(["a"], np.array([8]), np.array([4]), np.array([10]))
    for token in range(2):
        assert_done(buffers, SET, token)
        assert_done(buffers, swap, token + 2)
    assert_done(buffers, [], 4)  # nobody's


def test_what_is_added_and_its_slots_share_a_row(runtime, buffers):
    runtime.admit("a", steering(SET, terms=[(VECTORS[3], 2.0)]))
    decode_step(runtime, "a")
    assert_done(buffers, SET)
    row = int(buffers.index[0])
    np.testing.assert_allclose(
        buffers.table[0, row].numpy() * float(buffers.row_gate[0]), 2.0 * VECTORS[3].directions[SITES[0]], rtol=1e-6
    )
    assert runtime.rows_in_use == 4
    runtime.release("a")
    assert runtime.rows_in_use == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_projections_land_on_the_directions_as_the_table_rounds_them(dtype):
    buffers = make_slot_buffers(dtype=dtype)
    runtime = SteeringRuntime(buffers, max_requests=4)
    runtime.admit("a", steering(SET))
    decode_step(runtime, "a")
    row = int(buffers.index[0])
    for position, site in enumerate(SITES):
        z = done(buffers, STREAM[position], 0, site)
        for k in range(len(SET)):
            read = int(buffers.slots.rows[position, row, k, 0])
            factor, _, strength, low, high = buffers.slots.params[position, row, k, :5].tolist()
            along = buffers.table[position, read].double().numpy() * factor
            u = STREAM[position] @ along
            assert z @ along == pytest.approx(u + strength * (np.clip(u, low, high) - u), abs=2e-6)
        np.testing.assert_allclose(z, due(STREAM[position], SET, site), atol=0.1)


def test_requests_with_one_program_share_its_row_and_its_directions(runtime, buffers):
    runtime.admit("a", steering(SET))
    runtime.admit("b", steering(SET))
    runtime.admit("c", steering([Ask(VECTORS[0], 0.5)]))
    assert runtime.rows_in_use == 1 + 3 + 1
    decode_step(runtime, "a", "b", "c")
    assert_done(buffers, SET, 1)
    assert_done(buffers, [Ask(VECTORS[0], 0.5)], 2)
    runtime.release("a")
    decode_step(runtime, "b", "c")
    assert_done(buffers, SET, 0)


def test_a_request_gives_up_its_directions_for_those_that_replace_them():
    buffers = make_slot_buffers(max_rows=5)
    runtime = SteeringRuntime(buffers, max_requests=4)
    for asked in (SET, [Ask(one) for one in (VECTORS[1], TILTED[1])], SET):
        runtime.admit("a", steering(asked))
        decode_step(runtime, "a")
        assert_done(buffers, asked)
        assert runtime.rows_in_use == len(asked) + 1


def test_a_program_that_comes_back_is_written_again_only_where_its_directions_lie_elsewhere(runtime, buffers):
    runtime.admit("a", steering(SET[:1]))
    decode_step(runtime, "a")
    runtime.release("a")
    decode_step(runtime, "stranger")
    before = records(buffers)
    buffers.slots.slab.fill_(0x5A)
    runtime.admit("a", steering(SET[:1]))
    decode_step(runtime, "a")
    assert (buffers.slots.slab == 0x5A).all()
    buffers.slots.slab.copy_(before)
    runtime.admit("b", steering(SET[1:]))
    decode_step(runtime, "a", "b")
    assert_done(buffers, SET[:1], 0)
    assert_done(buffers, SET[1:], 1)


def test_rows_that_were_given_away_while_nobody_held_them_are_right_when_they_come_back():
    for max_rows in (4, 5, 6):
        for others in range(1, max_rows - 1):
            buffers = make_slot_buffers(max_rows)
            runtime = SteeringRuntime(buffers, max_requests=8)
            for _ in range(2):
                runtime.admit("a", steering(SET[:1]))
                decode_step(runtime, "a")
                assert_done(buffers, SET[:1])
                runtime.release("a")
                for number in range(others):
                    runtime.admit(f"{number}", steering([], terms=[(vector(number), 1.0)]))
                decode_step(runtime, *map(str, range(others)))
                for number in range(others):
                    runtime.release(f"{number}")


def test_a_record_follows_its_directions_wherever_they_lie(buffers):
    """By itself: in the runtime a row is given away before those that its slots read."""
    rows = slot_rows.SlotRows(buffers, buffers.slots)
    program = steering(SET[:1]).decode
    (key,) = (way.row_key for way in SET[0].slot.directions)

    def read():
        return buffers.slots.rows[:, 1, 0, 0].tolist()

    rows.fill(1, program, {key: 2, b"another's": 3}, fresh=True)
    rows.write()
    assert read() == [2, 2, 2]
    before = list(rows.state())
    rows.fill(1, program, {key: 4}, fresh=False)
    rows.let_go(1)
    assert list(rows.state()) == before
    rows.write()
    assert read() == [2, 2, 2]
    rows.fill(1, program, {key: 4}, fresh=False)
    rows.write()
    assert read() == [4, 4, 4]
    rows.fill(1, steering([], terms=[(VECTORS[0], 1.0)]).decode, {}, fresh=True)
    rows.write()
    assert not buffers.slots.slab.any()


@pytest.mark.parametrize("comes", ["plain", "direction"])
def test_a_row_that_is_given_to_content_without_slots_has_none(comes):
    buffers = make_slot_buffers(max_rows=3)
    runtime = SteeringRuntime(buffers, max_requests=4)
    runtime.admit("a", steering(SET[:1]))
    decode_step(runtime, "a")
    assert (buffers.slots.slab != 0).any()
    runtime.release("a")
    if comes == "plain":
        for name, seed in (("b", 1), ("c", 2)):
            runtime.admit(name, steering([], terms=[(vector(seed), 1.0)]))
        decode_step(runtime, "b", "c")
        assert not buffers.slots.slab.any()
    else:
        runtime.admit("b", steering(SET[1:2]))
        decode_step(runtime, "b")
        assert_done(buffers, SET[1:2])
        assert int((buffers.slots.rows[0, :, 0, 0] != 0).sum()) == 1


def test_what_was_admitted_and_let_go_before_a_step_is_written_when_it_comes_back(runtime, buffers):
    runtime.admit("another", steering([], terms=[(VECTORS[0], 1.0)]))
    runtime.admit("a", steering(SET))
    runtime.release("a")
    decode_step(runtime, "another")
    assert runtime.row_uploads == 1
    assert not buffers.slots.slab.any()
    runtime.admit("a", steering(SET))
    decode_step(runtime, "a")
    assert_done(buffers, SET)


def test_records_of_all_sites_and_rows_go_up_in_one_copy_and_only_when_new(runtime, buffers, monkeypatch):
    scatters = []
    original = torch.Tensor.index_copy_

    def recorded(table, dim, rows, source):
        if table.data_ptr() == buffers.slots.slab.data_ptr():
            scatters.append((dim, len(rows), source.shape[0]))
        return original(table, dim, rows, source)

    monkeypatch.setattr(torch.Tensor, "index_copy_", recorded)
    runtime.admit("a", steering(SET, SET[:1]))
    runtime.admit("b", steering(SET[1:]))
    for _ in range(2):
        decode_step(runtime, "a", "b")
    runtime.admit("c", steering(SET))
    runtime.release("a")
    decode_step(runtime, "b", "c")
    assert scatters == [(1, 3, len(SITES))]


def test_a_set_that_is_spread_over_sites_is_mixed_once(runtime, buffers, monkeypatch):
    seen = []
    original = slot_rows.mixing
    monkeypatch.setattr(slot_rows, "mixing", lambda *args: seen.append(0) or original(*args))
    same = [type(one)(dict.fromkeys(SITES, one.directions[SITES[0]])) for one in VECTORS[:2]]
    runtime.admit("a", steering([Ask(one) for one in same]))
    decode_step(runtime, "a")
    assert len(seen) == 1
    assert_done(buffers, [Ask(one) for one in same])
    runtime.admit("b", steering([Ask(one) for one in VECTORS[:2]]))
    decode_step(runtime, "b")
    assert len(seen) == 1 + len(SITES)
    assert_done(buffers, [Ask(one) for one in VECTORS[:2]])


def test_a_set_that_is_known_is_not_mixed_again_and_its_records_have_the_same_bits(runtime, buffers, monkeypatch):
    added = steering(SET, terms=[(VECTORS[3], 2.0)])  # another row of the same set
    other = make_slot_buffers()
    fresh = SteeringRuntime(other, max_requests=4)
    fresh.admit("a", added)
    decode_step(fresh, "a")
    runtime.admit("a", steering(SET))
    decode_step(runtime, "a")
    monkeypatch.setattr(slot_rows, "mixing", None)
    runtime.admit("a", added)
    decode_step(runtime, "a")
    for held in ("codes", "params", "mix"):
        mine, theirs = (getattr(one.slots, held)[:, int(one.index[0])] for one in (buffers, other))
        assert torch.equal(mine, theirs)
    assert_done(buffers, SET)


def gated_buffers(**more):
    return make_slot_buffers(20, gates=3, max_probes=9, **more)


def lanes_of(buffers, token=0):
    """The probe's row of each lane of a token."""
    return buffers.gates.probes[token].tolist()


def test_a_gate_that_only_slots_have_has_a_lane():
    buffers = gated_buffers()
    runtime = SteeringRuntime(buffers, max_requests=4)
    asked = [Ask(VECTORS[0], gate=GATE), Ask(TILTED[0])]
    runtime.admit("a", steering(asked))
    decode_step(runtime, "a")
    assert lanes_of(buffers) == [1, 0, 0]
    assert buffers.gates.rows[0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(buffers.gates.params[0, 0, 1:3], np.float32([GATE.threshold, GATE.sharpness]))
    assert_done(buffers, asked, factors=[0.3], by_gate={GATE.digest: 0.3})


def test_slots_of_two_programs_look_at_the_lanes_of_their_own():
    """Equal slots behind equal gates, but in one program a gated sum has the first lane."""
    buffers = gated_buffers()
    runtime = SteeringRuntime(buffers, max_requests=4)
    asked = [Ask(VECTORS[0], gate=GATE)]
    slots = [ask.slot for ask in asked]
    more = PhaseProgram.of([Term(VECTORS[1], 1.0, gate=BEFORE)], slots)
    runtime.admit("a", steering(asked))
    runtime.admit("b", ResolvedSteering((more, more)))
    decode_step(runtime, "a", "b")
    assert_done(buffers, asked, 0, factors=[0.3, 9.0, 9.0], by_gate={GATE.digest: 0.3})
    assert_done(buffers, asked, 1, factors=[9.0, 0.3, 9.0], by_gate={GATE.digest: 0.3})


REFUSED = {
    "no slots": ({"form": None}, SET, "brings 3; the buffers hold none"),
    "too many at one site": (
        {"form": FORM._replace(count=2)}, SET, f"brings 3 at {SITES[0]}; the buffers hold 2 for one site",
    ),
    "a write": (
        {"form": FORM._replace(writes=False)}, [Ask(VECTORS[3], to=VECTORS[1])],
        "brings one that writes along another direction than it reads; the buffers hold none such",
    ),
    "a site": ({"slot_sites": SITES[:1]}, SET, f"brings one at {SITES[1]}, {SITES[2]}, where none can act"),
    "no room": ({"max_rows": 4}, SET, "finds no room for its rows among 3"),
    "a gate": ({}, [Ask(VECTORS[0], gate=GATE)], "brings 1 in a phase; the buffers hold 0"),
    "a width": ({}, [Ask(vector(1, hidden=3))], "brings width 3"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_buffers_cannot_hold_is_refused_and_changes_nothing(what):
    made, asked, message = REFUSED[what]
    runtime = SteeringRuntime(make_slot_buffers(**{"max_rows": 12, **made}), max_requests=4)
    runtime.admit("a", steering([], terms=[(vector(1), 1.0)]))
    decode_step(runtime, "a")
    before = runtime.digest()
    with pytest.raises(SteeringError, match=f"request 'a' {message}"):
        runtime.admit("a", steering(asked))
    assert runtime.digest() == before


def test_a_response_that_the_form_lacks_is_refused(runtime, buffers):
    buffers.slots.form = FORM._replace(responses=("another",))
    with pytest.raises(SteeringError, match="brings the response 'clip'; the buffers hold another"):
        runtime.admit("a", steering(SET))


def test_pipeline_stages_hold_the_slots_of_their_own_sites_and_agree():
    stages = [make_slot_buffers(sites=sites) for sites in (SITES, SITES[:1], SITES[1:], ())]
    runtimes = [SteeringRuntime(stage, max_requests=4) for stage in stages]
    for runtime in runtimes:
        runtime.admit("a", steering(SET, SET[:2]))
        decode_step(runtime, "a")
        runtime.admit("b", steering(SET[1:]))
    for stage in stages:
        assert_done(stage, SET[:2])
    assert len({runtime.digest() for runtime in runtimes}) == 1


def test_sites_where_slots_act_do_not_rest_and_those_of_directions_do(runtime, buffers):
    runtime.admit("a", steering([Ask(VECTORS[0], sites=SITES[1:2])]))
    decode_step(runtime, "a")
    assert buffers.any_active[:, 0].tolist() == [False, True, False]
    assert [state.resting for state in buffers.states] == [True, False, True]
    runtime.release("a")
    decode_step(runtime, "a")
    assert not buffers.any_active.any()


def test_row_monitors_leave_the_slots_of_a_program_alone():
    buffers = gated_buffers(row_monitor=True)
    runtime = SteeringRuntime(buffers, max_requests=4, lowers=True)
    term = Term(vector(5, SITES[:1]), 1.0, gate=GATE)
    program = PhaseProgram.of([term], [ask.slot for ask in SET])
    runtime.admit("a", ResolvedSteering((program, program)))
    decode_step(runtime, "a")
    assert_done(buffers, SET)
    assert lanes_of(buffers) == [1, 0, 0]


def test_buffers_of_slots_steer_requests_without_any_as_others_do(runtime, buffers):
    assert isinstance(buffers, SteeringBuffers)
    runtime.admit("a", steering([], terms=[(VECTORS[0], 2.0)]))
    decode_step(runtime, "a")
    assert not buffers.slots.slab.any()
    assert_done(buffers, [])
