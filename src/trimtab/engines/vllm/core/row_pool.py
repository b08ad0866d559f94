"""Rows are reserved in the engine core: a request that finds none is left in vLLM's own queues until others end.

The scheduler asks of every waiting request that it is about to run whether it is blocked. A steered request is, until
the pool has its rows; then it keeps them to its end, through preemption, so one that runs never waits. Nothing is taken
out of vLLM's queues, so aborts, draining, data parallelism and statistics see such requests as any that wait.

Workers free the rows of requests that have ended before they write those of new ones, within one scheduler output; what
a pass under way still reads is overwritten behind it, in stream order. So a row that is given back here may be given
out again in the very next step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trimtab.engines.vllm.carried import steering_of
from trimtab.engines.vllm.settings.config import SteeringSettings
from trimtab.engines.vllm.settings.flags import SETTINGS_KEY
from trimtab.engines.vllm.settings.tables import stamped_tables
from trimtab.errors import SteeringError
from trimtab.program.lowering import contents_of
from trimtab.runtime.pool import RowPool

_SCHEDULER = "vllm.v1.core.sched.scheduler"


class RowGate:
    """What the scheduler of one engine core asks before it runs a request, and tells of one that has ended."""

    def __init__(self, scheduler: Any, settings: SteeringSettings) -> None:
        """Raises `SteeringError` for a scheduler with a loop of its own, which may run requests without asking."""
        owner = next(kind for kind in type(scheduler).__mro__ if "schedule" in vars(kind))
        if owner.__module__ != _SCHEDULER:
            raise SteeringError(
                SETTINGS_KEY,
                f"the scheduler {owner.__module__}.{owner.__qualname__} decides in its own way which requests run, so "
                "none can be made to wait for rows: leave out scheduler_cls",
            )
        self.scheduler, self._settings = scheduler, settings
        room = stamped_tables(settings.stamp).room
        self._lowers = room.lowers
        self.pool = RowPool(room.rows, room.probes)
        self._limit = "max_num_active_reqs" if hasattr(scheduler, "max_num_active_reqs") else "max_num_running_reqs"
        self._left = 0  # within a step: requests that wait, for whatever, and were not let through
        self._by_priority = getattr(getattr(scheduler, "policy", None), "value", None) == "priority"

    def may_run(self, request: Any) -> bool:
        """Whether a vLLM `Request` that waits for nothing else has its rows, or needs none."""
        name = request.request_id
        if name not in self.pool:
            steering = steering_of(request.sampling_params, self._settings)
            if steering is None or not (needed := contents_of(steering, lowers=self._lowers)).rows:
                self._left -= 1
                return True
            # Under the policy "priority" vLLM's own order of requests, else that in which it asks.
            urgency = (float(request.priority), float(request.arrival_time)) if self._by_priority else ()
            self.pool.enter(name, needed, urgency)
        if self.pool.may_run(name):
            self._left -= 1
            return True
        self._ask_no_further()
        return False

    @contextmanager
    def a_step(self) -> Iterator[None]:
        """Within, the scheduler decides about one step: it looks at waiting requests only while one may have its rows.

        It looks while fewer run than may, and would ask each of a thousand in every step.
        """
        most = getattr(self.scheduler, self._limit)
        self._left = self.scheduler.get_request_counts()[1]
        self._ask_no_further()
        try:
            yield
        finally:
            setattr(self.scheduler, self._limit, most)
            self._left = 0

    def _ask_no_further(self) -> None:
        """End the look at waiting requests if all that are left wait for rows, with no room for the first in line.

        Not while one is on its way: it becomes one of the `running` after it was let through.
        """
        if self.pool.waiting == self._left and self.pool.stuck:
            setattr(self.scheduler, self._limit, len(self.scheduler.running))

    def ended(self, request: Any) -> None:
        """A request has ended, whether it ran or waited."""
        self.pool.leave(request.request_id)

    def require_queue(self, name: str, *, without: str) -> None:
        """Raise `SteeringError` if the scheduler queues requests in another way than before 0.32."""
        if not hasattr(self.scheduler, name) or hasattr(self.scheduler, without):
            raise SteeringError(SETTINGS_KEY, f"trimtab does not know this vLLM: {name} is missing, or {without} there")

    def blocks_first(self) -> None:
        """Before 0.32: requests that wait for blocks to arrive are asked before those that wait for rows.

        The queue is looked at from its front until a request gets no blocks. Blocks that arrive for requests behind
        would never be taken up, and those whose turn it is need just these: all would wait for ever.
        """
        queue = getattr(self.scheduler, "skipped_waiting", None)
        if not queue or self._by_priority or getattr(self.scheduler, "connector", None) is None:
            return
        arriving = [one for one in queue if getattr(one.status, "name", one.status) == "WAITING_FOR_REMOTE_KVS"]
        for request in reversed(arriving):
            queue.remove(request)
            queue.prepend_request(request)

    def require_asked(self, *questions: str) -> None:
        """Raise `SteeringError` if the scheduler has none of the methods that were replaced to ask."""
        if not any(question in vars(self.scheduler) for question in questions):
            names = " and no ".join(questions)
            raise SteeringError(SETTINGS_KEY, f"trimtab does not know this vLLM: Scheduler has no {names}")


def status(core: Any, digest: bool, answers: Sequence[str]) -> list[Any]:
    """What each worker of an engine core says of itself, and what its pool holds, if it is steered."""
    states = core.collective_rpc("trimtab_status", None, (digest, answers))
    gate: RowGate | None = getattr(core, "_trimtab_rows", None)
    held = {} if gate is None else {"rows_reserved": gate.pool.reserved, "requests_waiting": gate.pool.waiting}
    return [state | held if isinstance(state, dict) else state for state in states]
