"""Who is admitted to the runtime: the requests that a worker has seen and not yet seen leave."""

from collections.abc import Container, Iterable, Iterator

from trimtab.program import ResolvedSteering
from trimtab.runtime import SteeringRuntime


class Membership:
    """Admits and releases; the same on every rank, since all see the same scheduler outputs in the same order.

    The runtime has room for the largest batch. Steered requests that wait after preemption may still be members: when
    room runs out, they leave, and join again with their next batch.
    """

    def __init__(self, runtime: SteeringRuntime, max_requests: int) -> None:
        self._runtime, self._max_requests = runtime, max_requests
        self._members: dict[str, bool] = {}  # request id -> whether it is steered, in order of joining
        self._steered = 0
        self._leaving: set[str] = set()

    def new(self, request_ids: Iterable[str]) -> Iterator[str]:
        """Those of `request_ids` that have not joined."""
        return (request_id for request_id in request_ids if request_id not in self._members)

    def join(
        self, request_id: str, steering: ResolvedSteering | None, batch: Container[str], owner: str | None = None
    ) -> None:
        """Admit a request, reported under `owner`; `batch` are the requests that run now, which must not leave."""
        self.settle()
        self.leave((request_id,))
        if steering is not None:
            if self._steered >= self._max_requests:
                waiting = [member for member, steered in self._members.items() if steered and member not in batch]
                self.leave(waiting)
            self._runtime.admit(request_id, steering, owner=owner)
            self._steered += 1
        self._members[request_id] = steering is not None

    def leave(self, request_ids: Iterable[str]) -> None:
        """Release requests that finished or were preempted; unknown ones are no error."""
        for request_id in request_ids:
            if self._members.pop(request_id, False):
                self._steered -= 1
                self._runtime.release(request_id)

    def leave_soon(self, request_id: str) -> None:
        """Release a request at the next `settle`: vLLM names those that finish together in an order of its own on each
        rank, and which rows are reused first follows from the order of releases."""
        self._leaving.add(request_id)

    def settle(self) -> None:
        """Release what was announced by `leave_soon`, in one order everywhere."""
        if self._leaving:
            self.leave(sorted(self._leaving))
            self._leaving.clear()
