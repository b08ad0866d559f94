"""Rows as a pool: which request may start, where tables hold less than all requests together could need.

A request gets all that it needs, by content, before it first runs, and keeps it until it ends, whatever happens in
between. So a request that runs never waits, and whoever writes the rows always finds one. Those that do not fit wait in
a line, the most urgent first and then in order of arrival, and nobody passes them, not even one whose content is there
already: otherwise a request that needs much could wait for ever. What needs nothing is no concern of the pool.
"""

from bisect import insort
from collections import Counter

from trimtab.program.lowering import Contents

Urgency = tuple[float, ...]  # the smaller, the sooner; equal ones in order of arrival


class RowPool:
    """Reserves the rows of tables that others write. Knows no engine, and nothing of time: who asks says when."""

    def __init__(self, rows: int, probes: int = 0) -> None:
        """How many different contents each table holds: `rows` of all sites, and `probes`."""
        self._sizes = (rows, probes)
        self._holders: tuple[Counter[bytes], Counter[bytes]] = (Counter(), Counter())  # key -> requests that hold it
        self._contents: dict[str, Contents] = {}  # of all that are here, whether they hold or wait
        self._places: dict[str, tuple[Urgency, int, str]] = {}  # of those that wait
        self._line: list[tuple[Urgency, int, str]] = []  # the same, in order
        self._arrivals = 0

    @property
    def capacity(self) -> int:
        """Rows that can be reserved at one time."""
        return self._sizes[0]

    @property
    def reserved(self) -> int:
        """Rows that are reserved: equal content counts once."""
        return len(self._holders[0])

    @property
    def waiting(self) -> int:
        """Requests that have entered and hold nothing yet."""
        return len(self._line)

    @property
    def stuck(self) -> bool:
        """Whether requests wait and the first in line does not fit: none can start before another ends."""
        return bool(self._line) and not self._fits(self._contents[self._line[0][2]])

    def __contains__(self, request_id: str) -> bool:
        """Whether `request_id` has entered and not left."""
        return request_id in self._contents

    def enter(self, request_id: str, contents: Contents, urgency: Urgency = ()) -> None:
        """Take a place in line for `contents`.

        Raises ValueError for more than the whole pool, which no waiting could bring, and for one that is here already.
        """
        if request_id in self:
            raise ValueError(f"request {request_id!r} is here already")
        if not all(len(keys) <= size for keys, size in zip(contents, self._sizes, strict=True)):
            raise ValueError(f"request {request_id!r} needs {tuple(map(len, contents))}, more than {self._sizes}")
        self._arrivals += 1
        place = (urgency, self._arrivals, request_id)
        self._contents[request_id], self._places[request_id] = contents, place
        insort(self._line, place)

    def may_run(self, request_id: str) -> bool:
        """Whether a request that has entered holds its contents: from the moment on at which it is the first in line
        and they fit. Ask again of one that has to wait."""
        place = self._places.get(request_id)
        if place is None:
            return True
        contents = self._contents[request_id]
        if place != self._line[0] or not self._fits(contents):
            return False
        self._leave_line(request_id)
        for holders, keys in zip(self._holders, contents, strict=True):
            holders.update(keys)
        return True

    def leave(self, request_id: str) -> None:
        """Forget a request that has ended, whether it ran or waited. An unknown one is no error."""
        contents = self._contents.pop(request_id, None)
        if contents is None or self._leave_line(request_id):
            return
        for holders, keys in zip(self._holders, contents, strict=True):
            for key in keys:
                holders[key] -= 1
                if not holders[key]:
                    del holders[key]

    def _fits(self, contents: Contents) -> bool:
        return all(
            len(holders) + sum(key not in holders for key in keys) <= size
            for holders, keys, size in zip(self._holders, contents, self._sizes, strict=True)
        )

    def _leave_line(self, request_id: str) -> bool:
        """Whether it stood there."""
        place = self._places.pop(request_id, None)
        if place is not None:
            self._line.remove(place)
        return place is not None
