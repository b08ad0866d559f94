"""The pool of rows against an obvious model: who may start, and in which order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from trimtab.program.lowering import Contents
from trimtab.runtime.pool import RowPool

ROWS, PROBES = 5, 2
ROW_KEYS = st.frozensets(st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h"]), min_size=1, max_size=ROWS)
PROBE_KEYS = st.frozensets(st.sampled_from([b"p", b"q", b"r"]), max_size=PROBES)


class Waiting(RuleBasedStateMachine):
    """A scheduler of requests, and beside the pool the plainest account of it: who runs with what, who was sent away.

    Requests are looked at most urgent first, as schedulers do, and each look may stop early. One that may start does
    not always: a scheduler may lack something else.
    """

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.pool = RowPool(ROWS, PROBES)
        self.asked: dict[str, tuple[tuple[int, int], Contents]] = {}  # all that live: order and need
        self.holding: set[str] = set()
        self.running: set[str] = set()
        self.sent_away: set[str] = set()
        self.born = 0

    @rule(target=requests, urgency=st.integers(-1, 1), rows=ROW_KEYS, probes=PROBE_KEYS)
    def arrives(self, urgency, rows, probes):
        self.born += 1
        name = f"request-{self.born}"
        self.asked[name] = ((urgency, self.born), Contents(rows, probes))
        return name

    @rule(looks=st.integers(1, 12), lacking=st.sets(st.integers(0, 11)))
    def a_step(self, looks, lacking):
        for number, name in enumerate(self._queue()[:looks]):
            if self._asks(name) and number not in lacking:
                self.running.add(name)

    @rule(name=requests)
    def is_preempted(self, name):
        self.running.discard(name)

    @rule(name=consumes(requests))
    def ends_or_is_aborted(self, name):
        self._ends(name)

    @rule()
    def all_are_aborted(self):
        for name in list(self.asked):
            self._ends(name)

    @rule(target=requests, name=consumes(requests), rows=ROW_KEYS)
    def ends_and_comes_again_under_its_name(self, name, rows):
        if name not in self.asked:
            return multiple()
        urgency = self.asked[name][0][0]
        self._ends(name)
        self.born += 1
        self.asked[name] = ((urgency, self.born), Contents(rows, frozenset()))
        return name

    @invariant()
    def never_more_than_there_is_and_as_much_as_is_said(self):
        rows, probes = self._held()
        assert len(rows) <= ROWS
        assert len(probes) <= PROBES
        assert (self.pool.capacity, self.pool.reserved, self.pool.waiting) == (ROWS, len(rows), len(self.sent_away))
        first = min((self.asked[name] for name in self.sent_away), key=lambda one: one[0], default=None)
        assert self.pool.stuck is (first is not None and not self._room(first[1]))

    def teardown(self):
        """Nobody starves: with one request ending after the other, all that are left start, each in its turn."""
        for _ in range(len(self.asked)):
            started = [name for name in self._queue() if self._asks(name)]
            self.running.update(started)
            assert self.running, "only requests that wait are left"
            self._ends(min(self.running, key=lambda name: self.asked[name][0]))

    def _queue(self) -> list[str]:
        return sorted(self.asked.keys() - self.running, key=lambda name: self.asked[name][0])

    def _held(self) -> Contents:
        held = [self.asked[name][1] for name in self.holding]
        return Contents(set().union(*(one.rows for one in held)), set().union(*(one.probes for one in held)))

    def _room(self, need: Contents) -> bool:
        held = self._held()
        return len(held.rows | need.rows) <= ROWS and len(held.probes | need.probes) <= PROBES

    def _asks(self, name: str) -> bool:
        order, need = self.asked[name]
        room = self._room(need)
        passes_somebody = any(self.asked[other][0] < order for other in self.sent_away)
        due = name in self.holding or (room and not passes_somebody)
        if name not in self.pool:
            self.pool.enter(name, need, order[:1])
        assert self.pool.may_run(name) is due
        (self.holding if due else self.sent_away).add(name)
        if due:
            self.sent_away.discard(name)
        return due

    def _ends(self, name: str) -> None:
        self.pool.leave(name)
        self.asked.pop(name, None)
        for group in (self.holding, self.running, self.sent_away):
            group.discard(name)


Waiting.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
test_requests_start_in_order_when_there_is_room_and_none_starves = Waiting.TestCase


def asks(pool: RowPool, name: str, rows: set[bytes], urgency: float = 0.0) -> bool:
    if name not in pool:
        pool.enter(name, Contents(rows, frozenset()), (urgency,))
    return pool.may_run(name)


def test_a_request_whose_content_is_there_does_not_pass_one_that_waits():
    pool = RowPool(2)
    assert asks(pool, "first", {b"a", b"b"})
    assert not asks(pool, "large", {b"c", b"d"})
    assert not asks(pool, "free of charge", {b"a"})
    pool.leave("first")
    assert asks(pool, "large", {b"c", b"d"})
    assert not asks(pool, "free of charge", {b"a"})


def test_the_more_urgent_is_served_first_however_late_it_comes():
    pool = RowPool(1)
    assert asks(pool, "running", {b"a"})
    assert not asks(pool, "patient", {b"b"}, urgency=1.0)
    assert not asks(pool, "urgent", {b"c"}, urgency=0.0)
    pool.leave("running")
    assert not asks(pool, "patient", {b"b"}, urgency=1.0)
    assert asks(pool, "urgent", {b"c"}, urgency=0.0)


def test_what_would_never_fit_is_an_error_and_nobody_waits_behind_it():
    pool = RowPool(2, probes=1)
    with pytest.raises(ValueError, match="more than"):
        pool.enter("too many rows", Contents({b"a", b"b", b"c"}, set()))
    with pytest.raises(ValueError, match="more than"):
        pool.enter("too many probes", Contents({b"a"}, {b"p", b"q"}))
    assert pool.waiting == 0
    pool.enter("next", Contents({b"a", b"b"}, {b"p"}))
    assert pool.may_run("next")


def test_a_request_that_ends_leaves_what_others_hold_too():
    pool = RowPool(2)
    assert asks(pool, "one", {b"a", b"b"})
    assert asks(pool, "other", {b"a"})
    pool.leave("one")
    assert pool.reserved == 1
    assert asks(pool, "third", {b"c"})
    assert not asks(pool, "fourth", {b"d"})
