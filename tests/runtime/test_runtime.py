"""What the runtime promises beyond right sums: what it writes, what it does not, and what it refuses."""

import numpy as np
import pytest
import torch
from runtime_model import HIDDEN, SITES, make_buffers, poison, received, resolved, snapshot, unit, vector, written

from trimtab.errors import SteeringError
from trimtab.runtime import SteeringRuntime, upload

CALM, BOLD = vector(1), vector(2, SITES[:1])


def both(asked):
    return resolved(asked, asked)


def decode_step(runtime, *names, position=100, **kwargs):
    """One decode token for each request; their prompts have 10 tokens."""
    count = len(names)
    runtime.step(list(names), np.full(count, position), np.ones(count, int), np.full(count, 10), **kwargs)


def changed_rows(buffers):
    """Rows that were written since `poison`."""
    return {row for row in range(buffers.table.shape[1]) if (buffers.table[:, row].view(torch.uint8) != 0x5A).any()}


@pytest.fixture
def buffers():
    return make_buffers()


@pytest.fixture
def runtime(buffers):
    return SteeringRuntime(buffers, max_requests=4)


def test_a_change_writes_its_own_rows_and_no_other(runtime, buffers):
    runtime.admit("a", both([(CALM, 1.0)]))
    runtime.admit("b", both([(BOLD, 1.0)]))
    decode_step(runtime, "a", "b")
    poison(buffers)
    runtime.admit("c", resolved([(vector(3), 1.0)], [(vector(4), 1.0), (CALM, 2.0)]))
    decode_step(runtime, "a", "b", "c")
    rows = changed_rows(buffers)
    assert len(rows) == 2
    assert runtime.row_uploads == 4
    assert int(buffers.index[2]) in rows
    np.testing.assert_array_equal(
        buffers.table[0, int(buffers.index[2])].double().numpy() * float(buffers.row_gate[2]),
        (vector(4).directions[SITES[0]].astype(float) + 2.0 * CALM.directions[SITES[0]].astype(float)).astype("f4"),
    )
    poison(buffers)
    runtime.release("c")
    decode_step(runtime, "a", "b")
    assert changed_rows(buffers) == set()  # whoever leaves rewrites nothing


def test_all_changed_rows_of_all_sites_go_up_in_one_scatter(runtime, buffers, monkeypatch):
    scatters = []
    original = torch.Tensor.index_copy_

    def recorded(table, dim, rows, source):
        scatters.append((table.data_ptr(), dim, sorted(rows.tolist()), tuple(source.shape)))
        return original(table, dim, rows, source)

    monkeypatch.setattr(torch.Tensor, "index_copy_", recorded)
    runtime.admit("a", resolved([(CALM, 1.0)], [(BOLD, 1.0)]))
    runtime.admit("b", both([(vector(3), 1.0)]))
    decode_step(runtime, "a", "b")
    decode_step(runtime, "a", "b", position=101)
    assert scatters == [(buffers.table.data_ptr(), 1, [1, 2, 3], (len(SITES), 3, HIDDEN))]


def test_a_burst_larger_than_the_staging_buffer_goes_up_whole_in_pieces(buffers, monkeypatch):
    monkeypatch.setattr(upload, "ROW_STAGING_BYTES", 2 * (8 + len(SITES) * HIDDEN * 4) + 5)
    runtime = SteeringRuntime(buffers, max_requests=4)
    vectors = [vector(seed) for seed in range(5, 8)]
    for position, one in enumerate(vectors):
        runtime.admit(f"r{position}", both([(one, 1.0)]))
    decode_step(runtime, "r0", "r1", "r2")
    for position, one in enumerate(vectors):
        np.testing.assert_array_equal(received(buffers)[position], np.stack([one.directions[s] for s in SITES]))


def test_an_unchanged_plan_is_not_copied_again(runtime, buffers):
    runtime.admit("a", both([(CALM, 0.5)]))
    decode_step(runtime, "a", "stranger")
    before = poison(buffers)
    decode_step(runtime, "a", "stranger", position=101)
    assert snapshot(buffers) == before


def test_an_idle_batch_writes_nothing(runtime, buffers):
    before = poison(buffers)
    decode_step(runtime, "stranger", "", padded_tokens=8)
    runtime.admit("plain", None)
    runtime.admit("empty", both([]))
    decode_step(runtime, "plain", "empty")
    assert snapshot(buffers) == before
    assert runtime.rows_in_use == 0


def test_a_batch_without_steered_tokens_writes_nothing_while_steered_requests_wait(runtime, buffers):
    runtime.admit("waiting", resolved([], [(CALM, 1.0)]))
    decode_step(runtime, "stranger")  # the row and the flags go up
    before = poison(buffers)
    decode_step(runtime, "stranger", "stranger too")
    runtime.step(["waiting"], np.array([0]), np.array([4]), np.array([10]))  # its prompt is not steered
    assert snapshot(buffers) == before


def test_going_idle_cleans_exactly_once(runtime, buffers):
    runtime.admit("a", both([(CALM, 3.0)]))
    decode_step(runtime, "a", "a2", "a3")
    assert buffers.any_active.all()
    runtime.release("a")
    decode_step(runtime, "stranger")
    clean = make_buffers()
    assert torch.equal(buffers.token_slab, clean.token_slab)
    assert not buffers.any_active.any()
    before = poison(buffers)
    decode_step(runtime, "stranger")
    decode_step(runtime, "stranger", "other")
    assert snapshot(buffers) == before


def test_a_shorter_batch_leaves_no_token_of_the_longer_one_steered(runtime, buffers):
    runtime.admit("a", both([(CALM, 3.0)]))
    runtime.step(["a"], np.array([0]), np.array([40]), np.array([50]))
    assert buffers.index[:40].all()
    decode_step(runtime, "a")
    assert buffers.index[0] != 0
    assert not buffers.index[1:].any()
    assert (buffers.row_gate[1:] == 1).all()
    assert not buffers.decode_mask[1:].any()


def test_a_flag_follows_the_rows_with_content_at_its_site(runtime, buffers):
    def flags():
        decode_step(runtime, "a", "b")
        return buffers.any_active[:, 0].tolist()

    first, rest = vector(5, SITES[:1]), vector(6, SITES[1:])
    runtime.admit("a", resolved([(first, 1.0)], []))
    assert flags() == [True, False, False]
    runtime.admit("b", both([(rest, 1.0), (first, 2.0)]))
    assert flags() == [True, True, True]
    runtime.release("a")
    assert flags() == [True, True, True]
    runtime.admit("b", both([(rest, 1.0)]))
    assert flags() == [False, True, True]
    runtime.admit("b", both([(first, 9.0)]))  # a cached row knows its sites
    assert flags() == [True, False, False]


def test_one_vector_at_a_thousand_scales_takes_one_row():
    buffers = make_buffers(1000, max_tokens=1000)
    runtime = SteeringRuntime(buffers, max_requests=1000)
    scales = np.linspace(-3, 3, 1001)[np.arange(1001) != 500]
    names = [f"r{i}" for i in range(1000)]
    for name, scale in zip(names, scales, strict=True):
        runtime.admit(name, both([(CALM, float(scale))]))
    decode_step(runtime, *names)
    assert runtime.rows_in_use == runtime.row_uploads == 1
    assert set(buffers.index.tolist()) == {1}
    np.testing.assert_array_equal(buffers.row_gate.numpy(), scales.astype(np.float32) * np.float32(unit(CALM)))


@pytest.mark.parametrize("first", range(6, 12))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_row_and_gate_change_at_the_token_where_the_prompt_ends(runtime, buffers, first, count):
    prompt = 9
    runtime.admit("x", resolved([(CALM, 0.1)], [(BOLD, -7.3)]))
    runtime.admit("y", resolved([], [(CALM, 4.0)]))
    runtime.step(["x", "y"], np.array([first, first]), np.array([count, count]), np.array([prompt, prompt]))
    row = {True: None, False: None}
    steps = [(0.1 * unit(CALM), -7.3 * unit(BOLD)), (1.0, 4.0 * unit(CALM))]
    for lane, (prefill_gate, decode_gate) in enumerate(steps):
        for token in range(count):
            at, decode = lane * count + token, first + token >= prompt
            steered = lane == 0 or decode
            assert (buffers.index[at] != 0) == steered
            if steered:
                assert buffers.row_gate[at] == np.float32(decode_gate if decode else prefill_gate)
                assert buffers.decode_mask[at] == decode
            if lane == 0:
                row[decode] = int(buffers.index[at])
    if row[True] and row[False]:
        assert row[True] != row[False]


def test_readmission_uploads_nothing(runtime, buffers):
    steering = resolved([(CALM, 1.0)], [(CALM, 1.0), (BOLD, 1.0)])
    runtime.admit("a", steering)
    decode_step(runtime, "a")
    want, uploads = received(buffers), runtime.row_uploads
    runtime.release("a")
    decode_step(runtime, "stranger")
    table = buffers.table.clone()
    runtime.admit("a", steering)
    decode_step(runtime, "a")
    assert runtime.row_uploads == uploads
    assert torch.equal(buffers.table, table)
    np.testing.assert_array_equal(received(buffers), want)


def test_content_released_before_any_step_is_written_when_it_comes_back(runtime, buffers):
    runtime.admit("a", both([(CALM, 1.0)]))
    runtime.release("a")
    decode_step(runtime, "stranger")
    assert runtime.row_uploads == 0
    runtime.admit("b", both([(CALM, 1.0)]))
    decode_step(runtime, "b")
    np.testing.assert_array_equal(received(buffers)[0], np.stack([CALM.directions[s] for s in SITES]))


def test_thousands_of_distinct_vectors_pass_through_a_small_table(buffers):
    def made(seed):
        return vector(seed, (SITES[:1], SITES[1:2], SITES[1:], SITES)[seed % 4])

    runtime = SteeringRuntime(buffers, max_requests=4)
    choose = np.random.default_rng(0)
    held: dict[str, int] = {}
    for turn in range(3000):
        name = f"r{turn % 4}"
        runtime.release(name)
        held[name] = int(choose.integers(turn, turn + 12))  # some seen a few turns ago, most new
        runtime.admit(name, resolved([(made(held[name]), 2.0)], [(made(held[name] + 9000), 1.0)]))
        names = list(held)
        runtime.step(names, np.full(len(names), 9), np.full(len(names), 2), np.full(len(names), 10))
        if turn % 7 == 0:
            sums = received(buffers)
            for position, seed in enumerate(held.values()):
                for offset, one, scale in ((0, made(seed), 2.0), (1, made(seed + 9000), 1.0)):
                    want = [scale * one.directions.get(site, np.zeros(HIDDEN)) for site in SITES]
                    np.testing.assert_array_equal(sums[2 * position + offset], want)
            sites = {site for seed in held.values() for one in (made(seed), made(seed + 9000)) for site in one.sites}
            assert buffers.any_active[:, 0].tolist() == [site in sites for site in SITES]
    assert runtime.row_uploads > 2000
    assert runtime.rows_in_use == 2 * len(set(held.values()))
    for name in held:
        runtime.release(name)
    assert runtime.rows_in_use == 0


def test_a_full_house_of_distinct_content_fits_the_smallest_table_allowed():
    runtime = SteeringRuntime(make_buffers(3), max_requests=3)
    assert runtime.capacity == 6
    for turn in range(3):
        for i in range(3):  # replacing what is held never needs a row more
            runtime.admit(f"r{i}", resolved([(vector(10 * turn + i), 1.0)], [(vector(100 + 10 * turn + i), 1.0)]))
    decode_step(runtime, "r0", "r1", "r2")
    assert runtime.rows_in_use == 6
    with pytest.raises(SteeringError, match="limit is 3"):
        runtime.admit("one more", both([(CALM, 1.0)]))
    runtime.admit("unsteered", None)


def test_a_request_that_finds_no_room_is_refused_and_nothing_of_it_is_held():
    other = vector(8)
    with pytest.raises(SteeringError, match="max_requests"):
        SteeringRuntime(make_buffers(4), max_requests=0)
    buffers = make_buffers(1)  # two rows
    runtime = SteeringRuntime(buffers, max_requests=3)
    runtime.admit("a", resolved([(CALM, 1.0)], [(other, 1.0)]))
    runtime.admit("shares", resolved([(other, 2.0)], [(CALM, 3.0)]))
    new = resolved([(vector(7), 1.0)], [(CALM, 1.0)])
    for name in ("b", "a"):  # of what "a" holds "shares" lets go of nothing
        with pytest.raises(SteeringError, match=f"max_rows: request {name!r} finds no room for its rows among 2"):
            runtime.admit(name, new)
    assert runtime.rows_in_use == 2
    decode_step(runtime, "a")
    np.testing.assert_array_equal(received(buffers)[0], np.stack([other.directions[s] for s in SITES]))
    runtime.release("shares")
    runtime.admit("a", new)
    assert runtime.rows_in_use == 2


def test_a_vector_of_another_width_is_refused_and_the_old_steering_kept(runtime, buffers):
    runtime.admit("a", both([(CALM, 1.0)]))
    with pytest.raises(SteeringError, match=f"width 3; the model's is {HIDDEN}"):
        runtime.admit("a", both([(vector(1, hidden=3), 1.0)]))
    decode_step(runtime, "a")
    np.testing.assert_array_equal(received(buffers)[0], np.stack([CALM.directions[s] for s in SITES]))


def test_releasing_an_unknown_request_does_nothing(runtime):
    before = runtime.digest()
    runtime.release("nobody")
    assert runtime.digest() == before


def test_a_batch_longer_than_the_buffers_or_its_padding_is_refused(runtime):
    runtime.admit("a", both([(CALM, 1.0)]))
    with pytest.raises(ValueError, match="65 tokens"):
        runtime.step(["a"], np.array([0]), np.array([65]), np.array([70]))
    with pytest.raises(ValueError, match="5 tokens in a forward pass of 4"):
        runtime.step(["a"], np.array([0]), np.array([5]), np.array([70]), padded_tokens=4)


def test_a_list_of_ids_that_the_engine_edits_in_place_is_noticed(runtime, buffers):
    runtime.admit("a", both([(CALM, 1.0)]))
    ids = ["a", "stranger"]
    arguments = (np.array([20, 20]), np.array([1, 1]), np.array([10, 10]))
    runtime.step(ids, *arguments)
    assert (buffers.index[:2] != 0).tolist() == [True, False]
    ids.reverse()
    runtime.step(ids, *arguments)
    assert (buffers.index[:2] != 0).tolist() == [False, True]
    runtime.step(tuple(ids[::-1]), *arguments)
    assert (buffers.index[:2] != 0).tolist() == [True, False]


def test_a_batch_of_the_same_ids_sees_a_later_admission(runtime, buffers):
    runtime.admit("a", both([(CALM, 1.0)]))
    decode_step(runtime, "a", "b")
    runtime.admit("b", both([(CALM, 2.0)]))
    decode_step(runtime, "a", "b")
    assert buffers.row_gate[:2].tolist() == [unit(CALM), 2.0 * unit(CALM)]
    runtime.release("a")
    decode_step(runtime, "a", "b")
    assert (buffers.index[:2] != 0).tolist() == [False, True]


def test_table_rows_are_rounded_once_to_the_models_dtype():
    buffers = make_buffers(dtype=torch.bfloat16)
    runtime = SteeringRuntime(buffers, max_requests=4)
    runtime.admit("a", both([(CALM, 1.1), (BOLD, 0.3)]))
    decode_step(runtime, "a")
    exact = np.float64(1.1) * CALM.directions[SITES[0]].astype(float)
    exact += np.float64(0.3) * BOLD.directions[SITES[0]].astype(float)
    rounded = torch.from_numpy(exact.astype(np.float32)).bfloat16().double()
    np.testing.assert_array_equal(received(buffers)[0, 0], rounded.numpy())


def test_pipeline_stages_with_other_sites_agree_and_hold_only_their_own():
    stages = [make_buffers(sites=SITES[:1]), make_buffers(sites=SITES[1:]), make_buffers(sites=())]
    runtimes = [SteeringRuntime(stage, max_requests=4) for stage in stages]
    for runtime in runtimes:
        runtime.admit("a", both([(CALM, 1.0)]))
        runtime.admit("b", both([(BOLD, 1.0)]))  # nothing of it lies on the second stage
        decode_step(runtime, "a", "b")
        runtime.release("a")
        decode_step(runtime, "b")
    assert len({runtime.digest() for runtime in runtimes}) == 1
    content = stages[1].table[:, 1].numpy() * unit(CALM)
    np.testing.assert_array_equal(content, [CALM.directions[s] for s in SITES[1:]])
    assert not stages[1].table[:, 2].any()
    assert stages[0].any_active.all()
    assert not stages[1].any_active.any()


def test_the_digest_tells_apart_what_the_device_would_do_differently():
    def after(*events):
        runtime = SteeringRuntime(make_buffers(), max_requests=4)
        for event in events:
            event(runtime)
        return runtime.digest()

    def admit(name, *asked):
        return lambda runtime: runtime.admit(name, both(list(asked)))

    digests = [
        after(),
        after(admit("a", (CALM, 1.0))),
        after(admit("a", (CALM, 2.0))),
        after(admit("b", (CALM, 1.0))),
        after(admit("a", (CALM, 1.0)), lambda runtime: decode_step(runtime, "a")),
        after(admit("a", (CALM, 1.0)), lambda runtime: decode_step(runtime, "a", "a2")),
        after(admit("a", (CALM, 1.0)), lambda runtime: runtime.release("a")),
        after(admit("b", (BOLD, 1.0)), admit("a", (CALM, 1.0)), lambda runtime: runtime.release("b")),
    ]
    assert len(set(digests)) == len(digests)
    assert after(admit("a", (CALM, 1.0))) == digests[1]


def test_only_table_flags_and_slab_are_ever_written(runtime, buffers):
    mine = {id(tensor) for tensor in written(buffers)}
    views = {"index", "row_gate", "token_scales", "decode_mask"}
    others = {
        name: value
        for name, value in vars(buffers).items()
        if isinstance(value, torch.Tensor) and id(value) not in mine and name not in views
    }
    before = {name: value.clone() for name, value in others.items()}
    runtime.admit("a", resolved([(CALM, 2.0)], [(BOLD, 1.0), (CALM, 1.0)]))
    decode_step(runtime, "a")
    runtime.release("a")
    decode_step(runtime)
    assert {"scales", "dynamic_vec", "monitor_active"} <= others.keys()
    assert all(torch.equal(before[name], others[name]) for name in others)
