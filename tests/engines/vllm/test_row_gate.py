"""How a scheduler is made to ask for rows, for the two forms in which vLLM's asks whether a request is blocked.

The schedulers here are made up, with the loop over waiting requests as the versions have it; the real one of the
installed version is in `test_row_pool`.
"""

from collections import deque
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.engines.vllm.carried import Carried
from trimtab.engines.vllm.core import row_pool as rows
from trimtab.engines.vllm.core.row_pool import RowGate, status
from trimtab.engines.vllm.patches.core import _QUESTIONS, SCHEDULER
from trimtab.engines.vllm.patches.patching import put_on
from trimtab.errors import SteeringError
from trimtab.program.codec import encode
from trimtab.sites import HookPoint, ModelSites, Site
from trimtab.spec import Steering

SITE = Site(0, HookPoint.POST_BLOCK)


class Policy(Enum):
    FCFS = "fcfs"
    PRIORITY = "priority"


class Queue(deque):
    add_request, prepend_request = deque.append, deque.appendleft


class Newer:
    """From 0.32 on: one question."""

    def __init__(self, policy: Policy = Policy.FCFS) -> None:
        self.policy, self.waiting, self.running = policy, Queue(), []
        self.max_num_active_reqs, self.asked = 64, 0

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), len(self.waiting)

    def schedule(self) -> list[str]:
        started = []
        for request in self._ordered():
            if len(self.running) + len(started) >= self.max_num_active_reqs:
                break
            self.asked += 1
            if self._handle_blocked_waiting_request(request):
                started.append(request)
        self.waiting = Queue(request for request in self.waiting if request not in started)
        self.running += started
        return [request.request_id for request in started]

    def _ordered(self) -> list[Any]:
        by_priority = self.policy is Policy.PRIORITY
        return sorted(self.waiting, key=lambda one: (one.priority, one.arrival_time) if by_priority else 0)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return request.status != "blocked"

    def _free_request(self, request: Any, delay_free_blocks: bool = False) -> str:
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        return f"freed {request.request_id}"

    def add(self, request: Any) -> Any:
        self.waiting.add_request(request)
        return request


class Older(Newer):
    """Before 0.32: the question in two parts, a queue for those that were skipped, and queueing by the first part."""

    def __init__(self, policy: Policy = Policy.FCFS) -> None:
        super().__init__(policy)
        self.skipped_waiting = Queue()
        self.max_num_running_reqs = self.max_num_active_reqs
        del self.max_num_active_reqs

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), len(self.waiting) + len(self.skipped_waiting)

    def schedule(self) -> list[str]:
        started, skipped = [], Queue()
        self.last_asked: list[str] = []
        while queue := self.skipped_waiting or self.waiting:
            if len(self.running) + len(started) >= self.max_num_running_reqs:
                break
            request = queue.popleft()
            self.asked += 1
            self.last_asked.append(request.request_id)
            if self._is_blocked_waiting_status(request.status) and not self._try_promote_blocked_waiting_request(
                request
            ):
                skipped.append(request)
            else:
                started.append(request)
        self.skipped_waiting = Queue([*skipped, *self.skipped_waiting])
        self.running += started
        return [request.request_id for request in started]

    _handle_blocked_waiting_request = property()  # it has none

    @staticmethod
    def _is_blocked_waiting_status(status: str) -> bool:
        return status == "blocked"

    def _try_promote_blocked_waiting_request(self, request: Any) -> bool:
        assert request.status == "blocked"
        return False

    def _enqueue_waiting_request(self, request: Any) -> None:
        (self.skipped_waiting if self._is_blocked_waiting_status(request.status) else self.waiting).append(request)

    def add(self, request: Any) -> Any:
        self._enqueue_waiting_request(request)
        return request


def request(name: str, number: int | None, status: str = "waiting", priority: int = 0, arrival: float = 0.0) -> Any:
    """One steered with a vector of that number; None for an unsteered one."""
    extra = None
    if number is not None:
        spec = {"interventions": [{"kind": "add", "vector": {"post_block": {"0": [1.0, number + 2.0]}}}]}
        steering = Steering.parse(spec).resolve({}, ModelSites(2, 1, frozenset({SITE})))
        extra = {"steering": Carried(encode(steering), steering)}
    params = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(
        request_id=name, sampling_params=params, status=status, priority=priority, arrival_time=arrival
    )


@pytest.fixture(params=[Newer, Older])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return gated(request.param(), monkeypatch)


def gated(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(rows, "_SCHEDULER", __name__)
    settings = SimpleNamespace(stamp={"tables": {"rows": 3, "probes": 1, "nbytes": 0, "lowers": False}})
    scheduler.gate = RowGate(scheduler, settings)
    put_on(scheduler, SCHEDULER, scheduler.gate)
    scheduler.gate.require_asked(*_QUESTIONS)
    return scheduler


def test_requests_wait_for_rows_in_order_and_unsteered_ones_pass(scheduler: Any) -> None:
    made = [scheduler.add(request(f"r{number}", None if number == 3 else number)) for number in range(6)]
    assert scheduler.schedule() == ["r0", "r1", "r3"]
    assert scheduler.schedule() == []
    assert scheduler._free_request(made[0], delay_free_blocks=True) == "freed r0"
    assert scheduler.schedule() == ["r2"]
    scheduler._free_request(made[1])
    scheduler._free_request(made[2])
    assert scheduler.schedule() == ["r4", "r5"]
    assert (scheduler.gate.pool.reserved, scheduler.gate.pool.waiting) == (2, 0)


def test_a_preempted_request_starts_again_before_those_that_wait_for_rows(scheduler: Any) -> None:
    made = [scheduler.add(request(f"r{number}", number)) for number in range(4)]
    assert scheduler.schedule() == ["r0", "r1"]
    scheduler.running.remove(made[0])
    made[0].status = "preempted"
    scheduler.waiting.appendleft(made[0])
    assert scheduler.schedule() == ["r0"]
    scheduler._free_request(made[1])
    assert scheduler.schedule() == ["r2"]


def test_nobody_is_asked_while_no_one_can_have_rows_and_everybody_is_when_something_changes(scheduler: Any) -> None:
    made = [scheduler.add(request(f"r{number}", number)) for number in range(40)]
    assert scheduler.schedule() == ["r0", "r1"]
    assert scheduler.asked == 40  # each has to tell once what it needs
    for _ in range(3):
        assert scheduler.schedule() == []
    assert scheduler.asked == 40
    scheduler.add(request("unsteered", None))
    assert scheduler.schedule() == ["unsteered"]
    scheduler._free_request(made[0])
    assert scheduler.schedule() == ["r2"]
    assert _limit(scheduler) == 64
    scheduler.running.remove(made[1])
    scheduler.waiting.appendleft(made[1])
    assert scheduler.schedule() == ["r1"]
    asked = scheduler.asked
    assert (scheduler.schedule(), scheduler.asked) == ([], asked)


def test_who_ends_makes_the_scheduler_ask_as_many_as_start_and_one_more(scheduler: Any) -> None:
    waiting = deque(scheduler.add(request(f"r{number}", number)) for number in range(40))
    started = scheduler.schedule()
    while waiting:
        for _ in started:
            scheduler._free_request(waiting.popleft())
        asked = scheduler.asked
        started = scheduler.schedule()
        assert started == [one.request_id for one in list(waiting)[:2]]
        assert scheduler.asked - asked == len(started) + (len(waiting) > 2)
        assert _limit(scheduler) == 64


def test_whoever_may_pass_is_asked_behind_those_that_wait(scheduler: Any) -> None:
    made = [scheduler.add(request(f"r{number}", None if number == 9 else number)) for number in range(12)]
    assert scheduler.schedule() == ["r0", "r1", "r9"]
    scheduler._free_request(made[0])
    scheduler.add(request("unsteered", None))
    scheduler.add(request("blocked", None, status="blocked"))
    assert scheduler.schedule() == ["r2", "unsteered"]
    scheduler._free_request(made[1])
    assert scheduler.schedule() == ["r3"]


def _limit(scheduler: Any) -> int:
    name = "max_num_running_reqs" if isinstance(scheduler, Older) else "max_num_active_reqs"
    limit: int = getattr(scheduler, name)
    return limit


def test_what_is_blocked_otherwise_reserves_nothing_and_an_abort_leaves_nothing(scheduler: Any) -> None:
    blocked = scheduler.add(request("blocked", 0, status="blocked"))
    for number in range(1, 4):
        scheduler.add(request(f"r{number}", number))
    assert scheduler.schedule() == ["r1", "r2"]
    (waits,) = [one for one in (*scheduler.waiting, *getattr(scheduler, "skipped_waiting", ())) if one is not blocked]
    scheduler._free_request(waits)
    assert scheduler.gate.pool.waiting == 0
    blocked.status = "waiting"
    assert scheduler.schedule() == []
    for one in list(scheduler.running):
        scheduler._free_request(one)
    assert "blocked" in scheduler.schedule()


def test_under_the_policy_priority_the_most_urgent_gets_the_next_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = gated(Newer(Policy.PRIORITY), monkeypatch)
    running = [scheduler.add(request(f"r{number}", number, priority=9)) for number in range(2)]
    assert scheduler.schedule() == ["r0", "r1"]
    scheduler.add(request("late", 5, priority=5, arrival=2.0))
    assert scheduler.schedule() == []
    scheduler.add(request("early", 6, priority=5, arrival=1.0))
    scheduler.add(request("urgent", 7, priority=1, arrival=3.0))
    assert scheduler.schedule() == []
    scheduler._free_request(running[0])
    assert scheduler.schedule() == ["urgent"]
    scheduler._free_request(running[1])
    assert scheduler.schedule() == ["early"]


def test_before_0_32_who_waits_for_blocks_is_asked_before_who_waits_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that has got its rows and finds no blocks would stand before those whose blocks it needs, for ever."""
    scheduler = gated(Older(), monkeypatch)
    scheduler.connector = object()
    for number in range(4):
        scheduler.add(request(f"r{number}", number))
    assert scheduler.schedule() == ["r0", "r1"]
    for name in ("first", "second"):
        scheduler.skipped_waiting.append(request(name, None, status="WAITING_FOR_REMOTE_KVS"))
    scheduler.schedule()
    assert scheduler.last_asked == ["first", "second", "r2"]


def test_a_scheduler_that_queues_in_another_way_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Older()
    other.kv_holding_waiting = Queue()
    with pytest.raises(SteeringError, match="kv_holding_waiting"):
        gated(other, monkeypatch)


def test_queueing_before_0_32_keeps_to_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = gated(Older(), monkeypatch)
    scheduler.add(request("blocked", None, status="blocked"))
    scheduler.add(request("ready", 1))
    assert [one.request_id for one in scheduler.skipped_waiting] == ["blocked"]
    assert [one.request_id for one in scheduler.waiting] == ["ready"]


def test_a_scheduler_that_does_not_ask_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Newer):
        _handle_blocked_waiting_request = property()

    with pytest.raises(SteeringError, match="Scheduler has no _handle_blocked_waiting_request and no _try_promote"):
        gated(Silent(), monkeypatch)
    monkeypatch.undo()
    settings = SimpleNamespace(stamp={"tables": {"rows": 3, "probes": 1, "nbytes": 0}})
    with pytest.raises(SteeringError, match=r"test_row_gate.Newer decides in its own way.*leave out scheduler_cls"):
        RowGate(Newer(), settings)


def test_an_engine_core_tells_what_its_pool_holds_with_what_its_workers_say(scheduler: Any) -> None:
    for number in range(3):
        scheduler.add(request(f"r{number}", number))
    scheduler.schedule()
    said = [{"rank": 0}, None]
    core = SimpleNamespace(collective_rpc=lambda *given: said, _trimtab_rows=scheduler.gate)
    assert status(core, True, ["a"]) == [{"rank": 0, "rows_reserved": 2, "requests_waiting": 1}, None]
    del core._trimtab_rows
    assert status(core, True, []) == said
