"""Who is admitted to the runtime: the requests that a worker has seen and not yet seen leave."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from trimtab.program import ResolvedSteering
from trimtab.runtime import SteeringRuntime


class History(NamedTuple):
    """The tokens of a request that its host knows, its prompt first, and the first position that is now computed."""

    tokens: Sequence[int]
    upto: int


class Membership:
    """Admits and releases; the same on every rank, since all see the same scheduler outputs in the same order.

    The runtime has room for the largest batch. Steered requests that wait after preemption may still be members: when
    room runs out, they leave, and join again with their next batch.

    Where a request's own tokens decide, the device follows them from the position on at which it joined; what lies
    before is told by the host. A request that begins anew further back is told of again (`fall_back`).
    """

    def __init__(self, runtime: SteeringRuntime, max_requests: int) -> None:
        self._runtime, self._max_requests = runtime, max_requests
        self._members: dict[str, bool] = {}  # request id -> whether it is steered, in order of joining
        self._steered = 0
        self._leaving: set[str] = set()
        self._followed: dict[str, History] = {}  # those whose tokens decide, as the device was told of them last

    @property
    def followed(self) -> Iterable[str]:
        """The members whose own tokens decide what they receive."""
        return self._followed.keys()

    def new(self, request_ids: Iterable[str]) -> Iterator[str]:
        """Those of `request_ids` that have not joined."""
        return (request_id for request_id in request_ids if request_id not in self._members)

    def join(
        self,
        request_id: str,
        steering: ResolvedSteering | None,
        batch: Container[str],
        owner: str | None = None,
        history: Callable[[], History] | None = None,
    ) -> None:
        """Admit a request, reported under `owner`; `batch` are the requests that run now, which must not leave.

        `history` is asked where positions or tokens decide what it receives.
        """
        self.settle()
        self.leave((request_id,))
        if steering is not None:
            if self._steered >= self._max_requests:
                waiting = [member for member, steered in self._members.items() if steered and member not in batch]
                self.leave(waiting)
            if steering.spans is None or history is None:
                self._runtime.admit(request_id, steering, owner=owner)
            else:
                told = history()
                self._runtime.admit(request_id, steering, owner=owner, tokens=told.tokens, upto=told.upto)
                if steering.spans.decided_by_tokens:
                    self._followed[request_id] = told
            self._steered += 1
        self._members[request_id] = steering is not None

    def fall_back(self, request_id: str, upto: int, tokens: Sequence[int] | None = None) -> None:
        """A followed request computes from position `upto` on.

        `tokens` are those that its host knows where it comes back from preemption. Without, it goes on, or begins again
        before the place at which it joined, since what it had from there on could not be loaded.
        """
        if tokens is not None:
            self._tell(request_id, History(tokens, upto))
        elif upto < (told := self._followed[request_id]).upto:
            self._tell(request_id, History(told.tokens, upto))

    def _tell(self, request_id: str, history: History) -> None:
        self._followed[request_id] = history
        self._runtime.seed(request_id, history.tokens, history.upto)

    def leave(self, request_ids: Iterable[str]) -> None:
        """Release requests that finished or were preempted; unknown ones are no error."""
        for request_id in request_ids:
            if self._members.pop(request_id, False):
                self._steered -= 1
                self._followed.pop(request_id, None)
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
