"""The row allocator: content-addressed, counted, least recently released first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.runtime.rows import RowAllocator

KEYS = [bytes([letter]) * 4 for letter in b"abcdefghij"]


def test_equal_content_shares_a_row_and_only_the_first_holder_must_write_it():
    rows = RowAllocator(4)
    first, fresh = rows.acquire(b"a")
    assert fresh
    assert rows.acquire(b"a") == (first, False)
    assert rows.holders(first) == 2
    assert rows.in_use == 1
    assert not rows.release(first)
    assert rows.release(first)
    assert rows.in_use == 0


def test_a_released_row_keeps_its_content_until_the_row_is_needed():
    rows = RowAllocator(3)
    a, _ = rows.acquire(b"a")
    rows.release(a)
    b, fresh = rows.acquire(b"b")
    assert fresh
    assert b != a  # an unused row was left, so `a` survives
    assert rows.acquire(b"a") == (a, False)


def test_the_row_released_longest_ago_is_reused_first():
    rows = RowAllocator(4)
    held = {key: rows.acquire(key)[0] for key in (b"a", b"b", b"c")}
    for key in (b"b", b"c", b"a"):
        rows.release(held[key])
    rows.release(rows.acquire(b"b")[0])  # used again: now the newest
    assert rows.acquire(b"x") == (held[b"c"], True)
    assert rows.acquire(b"y") == (held[b"a"], True)
    assert rows.acquire(b"b") == (held[b"b"], False)


def test_forgotten_content_is_gone_and_its_row_is_reused_first():
    rows = RowAllocator(3)
    a, b = rows.acquire(b"a")[0], rows.acquire(b"b")[0]
    rows.release(a)
    rows.release(b)
    rows.forget(b)
    assert rows.acquire(b"b") == (b, True)
    assert rows.acquire(b"a") == (a, False)


def test_more_held_content_than_rows_is_an_error_and_loses_nothing():
    rows = RowAllocator(2)
    a, _ = rows.acquire(b"a")
    with pytest.raises(IndexError):
        rows.acquire(b"b")
    assert rows.acquire(b"a") == (a, False)


@given(st.integers(2, 6), st.lists(st.tuples(st.booleans(), st.sampled_from(KEYS)), max_size=200))
def test_any_order_of_calls_keeps_one_row_per_held_content_and_never_gives_out_row_zero(max_rows, calls):
    rows, twin = RowAllocator(max_rows), RowAllocator(max_rows)
    holders = dict.fromkeys(KEYS, 0)
    place: dict[bytes, int] = {}  # the row that each key was last given
    content: dict[int, bytes] = {}  # what a caller that writes when told to would have in each row
    for take, key in calls:
        if take and (holders[key] or sum(map(bool, holders.values())) < max_rows - 1):
            row, fresh = rows.acquire(key)
            assert twin.acquire(key) == (row, fresh)
            assert 0 < row < max_rows
            assert not fresh or not any(count and place[other] == row for other, count in holders.items())
            if fresh:
                content[row] = key
            assert content[row] == key
            place[key] = row
            holders[key] += 1
        elif not take and holders[key]:
            holders[key] -= 1
            assert rows.release(place[key]) == twin.release(place[key]) == (holders[key] == 0)
        assert rows.in_use == sum(map(bool, holders.values()))
        assert all(content[place[key]] == key for key, count in holders.items() if count)
    assert list(rows.state()) == list(twin.state())


@given(
    calls=st.lists(st.tuples(st.booleans(), st.sampled_from(KEYS)), max_size=40), wanted=st.sets(st.sampled_from(KEYS))
)
def test_there_is_room_exactly_for_what_can_then_be_acquired(calls, wanted):
    rows, held = RowAllocator(6), []
    for take, key in calls:
        if take and rows.has_room({key}):
            held.append(rows.acquire(key)[0])
        elif held:
            rows.release(held.pop(0))
    let_go = held[: len(held) // 2]
    room = rows.has_room(wanted, let_go)
    for row in let_go:
        rows.release(row)
    kept = {rows._key_of[row] for row in held[len(let_go) :]}
    assert room is (len(kept | wanted) <= 5)
    if room:
        for key in wanted:
            rows.acquire(key)


def test_what_is_let_go_and_wanted_again_takes_its_row_again():
    rows = RowAllocator(3)
    held = [rows.acquire(key)[0] for key in (b"a", b"b")]
    assert rows.has_room({b"a", b"b"}, held)
    assert rows.has_room({b"c", b"d"}, held)
    assert not rows.has_room({b"a", b"b", b"c"}, held)
    assert not rows.has_room({b"c"})
